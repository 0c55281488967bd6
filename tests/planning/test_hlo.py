"""The reader of compiled programs, on excerpts small enough to count by hand."""

import json

import pytest

from lumina_jax.planning import hlo

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"


def entry(*lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"ENTRY %main (x: f32[]) -> f32[] {{\n{body}\n}}\n"


def computation(name: str, *lines: str) -> str:
    return (
        f"%{name} (p: f32[]) -> f32[] {{\n" + "\n".join(f"  {line}" for line in lines) + "\n}\n\n"
    )


LESS = "compare(%i, %end), direction=LT"


def loop(name: str, work: str, *, end: int, step: int = 1, condition: str = LESS) -> str:
    """A body that does `work` and counts in element 0, and its condition."""
    return computation(
        f"{name}_body",
        "%p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)}) parameter(0)",
        "%i = s32[]{:T(128)} get-tuple-element(%p), index=0",
        "%x = bf16[4,8]{1,0:T(8,128)} get-tuple-element(%p), index=1",
        f"%step = s32[]{{:T(128)}} constant({step})",
        "%next = s32[]{:T(128)} add(%i, %step)",
        work,
        "ROOT %tuple = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%next, %work)",
    ) + computation(
        f"{name}_cond",
        "%p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)}) parameter(0)",
        "%i = s32[]{:T(128)} get-tuple-element(%p), index=0",
        f"%end = s32[]{{:T(128)}} constant({end})",
        f"ROOT %less = pred[]{{:T(512)}} {condition}",
    )


def run_loop(name: str, start: str = "%zero") -> tuple[str, ...]:
    return (
        f"%init = (s32[], bf16[4,8]{{1,0}}) tuple({start}, %x)",
        f"%while = (s32[], bf16[4,8]{{1,0}}) while(%init), condition=%{name}_cond, "
        f'body=%{name}_body, metadata={{op_name="jit(step)/while"}}',
    )


ZERO = "%zero = s32[]{:T(128)} constant(0)"
X = "%x = bf16[4,8]{1,0:T(8,128)} parameter(0)"
DOT = (
    "%work = bf16[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, "
    'backend_config={"estimated_cycles":"100"}'
)
W = "%w = bf16[8,8]{1,0} constant({...})"
END = "ROOT %end = bf16[4,8]{1,0} get-tuple-element(%while), index=1"
GATHER = "dimensions={0}, use_global_device_ids=true"


def collectives(*lines: str, before: str = "") -> tuple[hlo.Collective, ...]:
    return hlo.analyze(HEADER + before + entry(*lines)).collectives


def test_a_loop_counts_as_often_as_it_turns():
    text = HEADER + loop("a", f"{W}\n  {DOT}", end=7) + entry(X, ZERO, *run_loop("a"), END)
    program = hlo.analyze(text)
    assert program.dot_flops == 7 * 2 * 4 * 8 * 8
    assert program.cycles == 700
    assert program.cycles_by == {"dots": 700}
    [hottest] = program.hottest(3)
    assert (hottest.name, hottest.executions) == ("work", 7)
    assert hottest.results == (hlo.ArrayType("bf16", (4, 8)),)


def test_loops_in_loops_multiply():
    inner = loop("inner", f"{W}\n  {DOT}", end=5)
    work = "\n  ".join((ZERO, *run_loop("inner"), "%work = bf16[4,8]{1,0} "
                        "get-tuple-element(%while), index=1"))  # fmt: skip
    text = HEADER + inner + loop("outer", work, end=3) + entry(X, ZERO, *run_loop("outer"), END)
    assert hlo.analyze(text).cycles == 3 * 5 * 100


def test_a_peeled_loop_turns_once_less():
    text = (
        HEADER
        + loop("a", f"{W}\n  {DOT}", end=7)
        + entry(X, "%one = s32[] constant(1)", *run_loop("a", "%one"), END)
    )
    assert hlo.analyze(text).cycles == 600


def test_a_loop_that_steps_by_two_turns_half_as_often():
    text = HEADER + loop("a", f"{W}\n  {DOT}", end=7, step=2) + entry(X, ZERO, *run_loop("a"), END)
    assert hlo.analyze(text).cycles == 400  # at 0, 2, 4 and 6


@pytest.mark.parametrize(
    ("condition", "start", "step", "turns"),
    [
        ("compare(%i, %end), direction=LE", 0, 1, 8),
        ("compare(%i, %end), direction=NE", 0, 1, 7),
        ("compare(%end, %i), direction=GT", 0, 1, 7),
        ("compare(%end, %i), direction=GE", 0, 1, 8),
        ("compare(%i, %end), direction=GT", 12, -1, 5),
        ("compare(%i, %end), direction=GE", 12, -2, 3),  # at 12, 10 and 8
        ("compare(%i, %end), direction=LT", 9, 1, 0),
    ],
)
def test_loops_may_count_in_any_direction(condition, start, step, turns):
    text = (
        HEADER
        + loop("a", f"{W}\n  {DOT}", end=7, step=step, condition=condition)
        + entry(X, f"%first = s32[] constant({start})", *run_loop("a", "%first"), END)
    )
    assert hlo.analyze(text).cycles == 100 * turns


def test_a_trip_count_that_the_compiler_knows_is_taken():
    known = 'backend_config={"known_trip_count":{"n":"9"}}'
    start, turn = run_loop("a")
    text = (
        HEADER + loop("a", f"{W}\n  {DOT}", end=7) + entry(X, ZERO, start, f"{turn}, {known}", END)
    )
    assert hlo.analyze(text).cycles == 900


def test_a_loop_of_unknown_length_is_an_error():
    number = "%n = s32[] parameter(1)"
    text = HEADER + loop("a", f"{W}\n  {DOT}", end=7) + entry(X, number, *run_loop("a", "%n"), END)
    with pytest.raises(ValueError, match=r"How often %while turns is not in the program .*fixed"):
        hlo.analyze(text)


def test_text_without_an_entry_is_an_error():
    with pytest.raises(ValueError, match=r"no ENTRY computation"):
        hlo.analyze("HloModule nothing\n")


def test_text_that_is_cut_off_is_an_error():
    with pytest.raises(ValueError, match=r"main has no ROOT: the text is cut off"):
        hlo.analyze(HEADER + "ENTRY %main (x: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n")


def test_products_in_fusions_count_and_their_cycles_once():
    fused = computation(
        "fused",
        "%a = bf16[256,64]{1,0} parameter(0)",
        "%b = bf16[64,32]{1,0} parameter(1)",
        "ROOT %c = bf16[256,32]{1,0} convolution(%a, %b), dim_labels=bf_io->bf, "
        'backend_config={"estimated_cycles":"999"}',
    )
    program = hlo.analyze(
        HEADER + fused + entry(
            "%a = bf16[256,64]{1,0} parameter(0)",
            "%b = bf16[64,32]{1,0} parameter(1)",
            "ROOT %f = bf16[256,32]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused, "
            'backend_config={"estimated_cycles":"50"}',
        )
    )  # fmt: skip
    assert program.dot_flops == 2 * 256 * 64 * 32
    assert program.cycles_by == {"dots": 50}


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "flops"),
    [
        # A batch of 3 products of 8x4 and 4x5, in the way of TPUs: the batch is a spatial dim.
        ("3,8,4", "3,4,5", "3,8,5",
         "window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf", 3 * 2 * 8 * 4 * 5),
        # 3x3 over 6x6 with a border of zeros: along each dim 6 * 3 - 2 taps fall on the picture.
        ("1,6,6,2", "3,3,2,7", "1,6,6,7",
         "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f", 2 * 2 * 7 * 16 * 16),
        # Every second of 8 outputs.
        ("1,8,2", "1,2,7", "1,4,7", "window={size=1 stride=2}, dim_labels=b0f_0io->b0f",
         2 * 2 * 7 * 4),
    ],
)  # fmt: skip
def test_convolutions_count_taps_on_the_input_alone(left, right, out, attributes, flops):
    program = hlo.analyze(
        HEADER
        + entry(
            f"%a = bf16[{left}] parameter(0)",
            f"%b = bf16[{right}] parameter(1)",
            f"ROOT %c = bf16[{out}] convolution(%a, %b), {attributes}",
        )
    )
    assert program.dot_flops == flops


@pytest.mark.parametrize(
    ("written", "groups", "crosses"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ((0, 1, 2, 3), (4, 5, 6, 7)), False),
        ("{}", (tuple(range(8)),), True),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7)), False),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7)), True),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ((0, 1, 2, 3), (4, 5, 6, 7)), False),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ((0, 4), (1, 5), (2, 6), (3, 7)), True),
        ("mesh['axis_0'=8] {'axis_0'}", (tuple(range(8)),), True),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7)), True),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", ((0, 1, 2, 3), (4, 5, 6, 7)), False),
    ],
)
def test_groups_are_read_in_every_form(written, groups, crosses):
    [reduced] = collectives(
        "%x = f32[16]{0} parameter(0)",
        f"ROOT %r = f32[16]{{0}} all-reduce(%x), channel_id=1, replica_groups={written}, "
        "use_global_device_ids=true, to_apply=%add",
    )
    assert reduced.groups == groups
    assert reduced.crosses(4) == crosses
    assert not reduced.crosses(8)


def test_groups_in_another_form_are_an_error():
    with pytest.raises(ValueError, match=r"devices of %r are written in an unknown form: .*wheel"):
        collectives(
            "%x = f32[16]{0} parameter(0)",
            "ROOT %r = f32[16]{0} all-reduce(%x), replica_groups=wheel(8), to_apply=%add",
        )


@pytest.mark.parametrize(
    ("instruction", "kind", "wire"),
    [
        (f"f32[64]{{0}} all-gather(%x), replica_groups=[2,4]<=[8], {GATHER}", "all-gather", 192),
        ("f32[4]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%add",
         "reduce-scatter", 48),
        ("f32[16]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add", "all-reduce", 96),
        ("f32[16]{0} all-to-all(%x), replica_groups=[2,4]<=[8], dimensions={0}", "all-to-all", 48),
        ("f32[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
         "collective-permute", 64),
        ("((f32[16]{0}), f32[64]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8]",
         "all-gather", 192),
    ],
)  # fmt: skip
def test_wire_bytes_are_those_of_a_ring(instruction, kind, wire):
    [found] = collectives("%x = f32[16]{0} parameter(0)", f"ROOT %c = {instruction}")
    assert (found.kind, found.wire_bytes) == (kind, wire)
    assert found.asynchronous == ("-start" in instruction)


def test_several_arrays_in_one_collective_are_added():
    [found] = collectives(
        "%x = f32[16]{0} parameter(0)",
        "%y = bf16[128,2]{1,0} parameter(1)",
        "ROOT %r = (f32[16]{0}, bf16[128,2]{1,0}) all-reduce(%x, %y), replica_groups=[1,8]<=[8], "
        "to_apply=%add",
    )
    assert found.bytes == 64 + 512
    assert (found.dtype, found.shape) == ("bf16", (128, 2))


def test_an_all_reduce_that_is_fused_with_its_slice_is_a_reduce_scatter():
    [found] = collectives(
        "%x = bf16[64,32]{1,0} parameter(0)",
        "ROOT %f = bf16[8,32]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.clone.1, "
        'metadata={op_name="jit(step)/dot_general"}',
        before=computation(
            "all-reduce-scatter.clone.1",
            "%input = bf16[64,32]{1,0} parameter(0)",
            "%all-reduce.6 = bf16[64,32]{1,0} all-reduce(%input), channel_id=4, "
            "replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add",
            "%at = u32[] constant(0)",
            "ROOT %part = bf16[8,32]{1,0} dynamic-slice(%all-reduce.6, %at, %at), "
            "dynamic_slice_sizes={8,32}",
        ),
    )
    assert found.kind == "reduce-scatter"
    assert found.wire_bytes == 64 * 32 * 2 * 7 / 8
    assert found.op_name == "jit(step)/dot_general"


@pytest.mark.parametrize(("chains", "num"), [((1, 1, 1), 1), ((1, 2, 2), 2)])
def test_the_repeats_of_an_asynchronous_gather_are_one(chains, num):
    """All on one channel: of another chain is the turn of a loop that was moved ahead of it."""
    calls = {"fused_computation.1": "AsyncCollectiveStart", "async_collective_fusion.2": "Other",
             "fused_computation.3": "AsyncCollectiveDone"}  # fmt: skip
    before, lines = "", ["%x = bf16[8,32]{1,0} parameter(0)"]
    for (name, target), chain in zip(calls.items(), chains, strict=True):
        before += computation(
            name,
            "%shard = bf16[8,32]{1,0} parameter(0)",
            f"%all-gather.{target} = bf16[64,32]{{1,0}} all-gather(%shard), channel_id=13, "
            f'replica_groups=[1,8]<=[8], {GATHER}, frontend_attributes={{chain_id="{chain}"}}',
            f"ROOT %c.{target} = bf16[64,32]{{1,0}} custom-call(%all-gather.{target}), "
            f'custom_call_target="{target}"',
        )
        lines.append(
            f"{'ROOT ' if 'Done' in target else ''}%f.{target} = bf16[64,32]{{1,0}} fusion(%x), "
            f"kind=kCustom, calls=%{name}"
        )
    found = collectives(*lines, before=before)
    assert len(found) == num
    assert all(gather.asynchronous and gather.executions == 1 for gather in found)
    assert {gather.wire_bytes for gather in found} == {64 * 32 * 2 * 7 / 8}


@pytest.mark.parametrize(
    ("transfer", "target", "kind", "wire", "groups"),
    [
        ("ALL_REDUCE", '"{1,2}x{0:7}"', "all-reduce", 2 * 64 / 2, 8),
        ("ALL_GATHER", '"{1,2}x{0:7}"', "all-gather", 128 / 2, 8),
        ("ALL_TO_ALL", "{{100000,200000},{100001,200001}}", "all-to-all", 64 / 2, 2),
        ("ONE_TO_ONE", "{{100000->200000},{200000->100000}}", "collective-permute", 64, 2),
    ],
)
def test_transfers_between_slices_are_collectives(transfer, target, kind, wire, groups):
    def attributes(channel):
        return (
            f"channel_id={channel}, is_host_transfer=true, frontend_attributes="
            '{_xla_host_transfer_handler_name="xla_megascale_runtime",'
            f'_xla_host_transfer_rendezvous="r_0",_xla_megascale_target={target},'
            f'_xla_megascale_transfer_type="{transfer}"}}'
        )

    got = "f32[32]{0}" if transfer == "ALL_GATHER" else "f32[16]{0}"
    [found] = collectives(
        "%x = f32[16]{0} parameter(0)",
        f"%s = (f32[16]{{0}}, u32[], token[]) send(%x, %t), {attributes(2)}",
        f"ROOT %r = ({got}, u32[], token[]) recv(%t), {attributes(1)}",
    )
    assert (found.kind, found.wire_bytes, len(found.groups)) == (kind, wire, groups)
    assert found.groups[0] == (0, 8)
    assert found.crosses(8)
    assert found.asynchronous


def test_a_transfer_in_another_form_is_an_error():
    def program(target, transfer):
        words = f'_xla_megascale_target={target},_xla_megascale_transfer_type="{transfer}"'
        return (
            "%x = f32[16]{0} parameter(0)",
            f"%s = (f32[16]{{0}}, u32[], token[]) send(%x, %t), {words}",
            f"ROOT %r = (f32[16]{{0}}, u32[], token[]) recv(%t), {words}",
        )

    with pytest.raises(ValueError, match=r"%s is an unknown transfer between slices: gossip"):
        collectives(*program('"{1,2}x{0:7}"', "GOSSIP"))
    with pytest.raises(ValueError, match=r"slices of %s are written in an unknown form: .*all"):
        collectives(*program('"all"', "ALL_REDUCE"))


def test_other_collectives_that_share_a_channel_are_several():
    pairs = "channel_id=1, source_target_pairs={{0,1},{1,2}}"
    found = collectives(
        "%x = f32[16]{0} parameter(0)",
        f"%a = f32[16]{{0}} collective-permute(%x), {pairs}",
        f"ROOT %b = f32[16]{{0}} collective-permute(%a), {pairs}",
    )
    assert len(found) == 2


def test_an_all_reduce_of_a_part_in_zeros_is_a_fake_gather():
    fused = computation(
        "fused",
        "%part = bf16[8,32]{1,0} parameter(0)",
        "%zeros = bf16[64,32]{1,0} parameter(1)",
        "%at = u32[] constant(0)",
        "ROOT %placed = bf16[64,32]{1,0} dynamic-update-slice(%zeros, %part, %at, %at)",
    )
    fake, true = collectives(
        "%x = bf16[8,32]{1,0} parameter(0)",
        "%zeros = bf16[64,32]{1,0} constant({...})",
        "%f = bf16[64,32]{1,0} fusion(%x, %zeros), kind=kLoop, calls=%fused",
        "%a = bf16[64,32]{1,0} all-reduce(%f), replica_groups=[1,8]<=[8], to_apply=%add",
        "ROOT %b = bf16[64,32]{1,0} all-reduce(%a), replica_groups=[1,8]<=[8], to_apply=%add",
        before=fused,
    )
    assert fake.fake_gather
    assert not true.fake_gather


def test_a_kernel_is_read_past_the_lines_and_braces_of_its_metadata():
    program = hlo.analyze(
        HEADER
        + entry(
            "%q = bf16[2,24,512,96]{3,2,1,0} parameter(0)",
            "%splash_fwd.1 = bf16[2,24,512,96]{3,2,1,0} custom-call(%q), "
            'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
            '"xprof_metadata":"{\\"block_q\\": 512}"\n'
            '}}, metadata={op_name="jit(step)/splash_fwd/pallas_call"}, backend_config='
            '{"custom_call_config":{"body":"TUz"},"used_scoped_memory_configs":[{"size":"9"}]}',
            'ROOT %c = bf16[2,24,512,96]{3,2,1,0} copy(%splash_fwd.1), backend_config='
            '{"estimated_cycles":"7"}',
        )
    )  # fmt: skip
    [kernel] = program.kernels
    assert (kernel.name, kernel.function) == ("splash_fwd.1", "splash_fwd")
    assert kernel.metadata == r'"xprof_metadata":"{\"block_q\": 512}"'
    assert kernel.op_name == "jit(step)/splash_fwd/pallas_call"
    assert json.loads(kernel.config) == {"custom_call_config": {"body": "TUz"}}
    assert kernel.operands == kernel.results == (hlo.ArrayType("bf16", (2, 24, 512, 96)),)
    assert program.cycles_by == {"copies": 7}


def test_a_kernel_inside_a_fusion_is_found():
    fused = computation(
        "fused",
        "%p = bf16[4,8]{1,0} parameter(0)",
        '%kernel.3 = bf16[4,8]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"body":"TUz"}}',
        "ROOT %n = bf16[4,8]{1,0} negate(%kernel.3)",
    )
    program = hlo.analyze(
        HEADER
        + fused
        + entry(
            X,
            "%once = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%fused, backend_config="
            '{"estimated_cycles":"5"}',
            "ROOT %y = bf16[4,8]{1,0} copy(%once)",
        )
    )
    [kernel] = program.kernels
    assert (kernel.name, kernel.executions) == ("kernel.3", 1)
    assert kernel.operands == kernel.results == (hlo.ArrayType("bf16", (4, 8)),)


def test_work_on_another_thread_of_the_device_counts():
    there = computation("there", X, W, "ROOT " + DOT).replace(
        "\n}\n", '\n}, execution_thread="sparsecore"\n'
    )
    program = hlo.analyze(
        HEADER
        + there
        + entry(
            X,
            "%s = ((bf16[4,8]{1,0}), bf16[4,8]{1,0}, u32[]) call-start(%x), "
            'async_execution_thread="sparsecore", to_apply=%there',
            "ROOT %d = bf16[4,8]{1,0} call-done(%s)",
        )
    )
    assert program.cycles == 100


def test_a_branch_that_holds_a_loop_is_taken_as_often_as_said():
    """The layers of a sampler, seven of them, in three of twelve evaluations."""
    layers = loop("layers", f"{W}\n  {DOT}", end=7)
    run = computation("run", X, ZERO, *run_loop("layers"), END)
    skip = computation("skip", X, W, f"ROOT {DOT}")
    chosen = "%work = bf16[4,8]{1,0} conditional(%i, %x, %x), branch_computations={%skip, %run}"
    text = HEADER + layers + run + skip + loop("path", chosen, end=12)
    text += entry(X, ZERO, *run_loop("path"), END)
    assert hlo.analyze(text).cycles == 100 * 12 + 700 * 12
    program = hlo.analyze(text, taken=0.25)
    assert program.cycles == 100 * 12 + 700 * 3
    assert program.dot_flops == 2 * 4 * 8 * 8 * (12 + 7 * 3)


def test_both_branches_of_a_conditional_count():
    branch = "%{0} = bf16[4,8]{{1,0}} parameter(0)"
    program = hlo.analyze(
        HEADER
        + computation("yes", "%x = bf16[4,8]{1,0} parameter(0)", W, "ROOT " + DOT)
        + computation("no", "ROOT " + branch.format("x"))
        + entry(
            X,
            "%p = s32[] parameter(1)",
            "ROOT %c = bf16[4,8]{1,0} conditional(%p, %x, %x), branch_computations={%yes, %no}",
        )
    )
    assert (program.conditionals, program.cycles) == (1, 100)


def test_traffic_with_pinned_host_memory_is_counted_each_way():
    program = hlo.analyze(
        HEADER
        + entry(
            "%kept = bf16[7,8,16]{2,1,0:T(8,128)(2,1)S(5)} parameter(0)",
            "%x = bf16[1,8,16]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)",
            "%i = s32[]{:T(128)} parameter(2)",
            "%w = ((bf16[7,8,16]{2,1,0:T(8,128)S(5)}, bf16[1,8,16]{2,1,0}, s32[], s32[], s32[]), "
            "bf16[7,8,16]{2,1,0:T(8,128)S(5)}, u32[]{:S(2)}) "
            "dynamic-update-slice-start(%kept, %x, %i, %i, %i)",
            "%wd = bf16[7,8,16]{2,1,0:T(8,128)S(5)} dynamic-update-slice-done(%w)",
            "%r = ((bf16[7,8,16]{2,1,0:T(8,128)S(5)}, s32[], s32[], s32[]), "
            "bf16[2,8,16]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) "
            "dynamic-slice-start(%wd, %i, %i, %i), dynamic_slice_sizes={2,8,16}",
            "%rd = bf16[2,8,16]{2,1,0:T(8,128)} dynamic-slice-done(%r)",
            "%near = (bf16[1,8,16]{2,1,0}, bf16[1,8,16]{2,1,0:S(1)}, u32[]) copy-start(%x)",
            "ROOT %c = (bf16[7,8,16]{2,1,0}, bf16[7,8,16]{2,1,0:S(5)}, u32[]) copy-start(%wd)",
        )
    )
    assert program.host_bytes == (1 * 8 * 16 * 2, (2 + 7) * 8 * 16 * 2)


def test_the_largest_arrays_come_first_and_each_once():
    program = hlo.analyze(
        HEADER
        + entry(
            "%x = f32[4,8]{1,0} parameter(0)",
            "%scores = bf16[2,64,64]{2,1,0} custom-call(%x), custom_call_target=\"AllocateBuffer\"",
            "%again = bf16[2,64,64]{2,1,0} copy(%scores)",
            "ROOT %y = (f32[4,8]{1,0}, pred[3]{0}) custom-call(%again), custom_call_target=\"F\"",
        )
    )  # fmt: skip
    assert [(str(buffer.array), buffer.array.bytes) for buffer in program.largest] == [
        ("bf16[2,64,64]", 16384),
        ("f32[4,8]", 128),
        ("pred[3]", 3),
    ]


def analyze(compiled, name: str) -> hlo.Program:
    return hlo.analyze((compiled / f"{name}.hlo").read_text())


def kinds(program: hlo.Program) -> dict[str, float]:
    wire = {}
    for collective in program.collectives:
        wire[collective.kind] = wire.get(collective.kind, 0.0) + collective.wire_bytes
    return wire


def test_the_operations_of_a_compiled_product_are_exact(compiled):
    program = analyze(compiled, "matmul")
    assert program.dot_flops == 2 * 256 * 1024 * 512
    assert program.cycles > 0
    assert not program.collectives


def test_recomputation_is_a_third_more_than_the_three_products_of_a_layer(compiled):
    program = analyze(compiled, "rematerialised")
    assert program.dot_flops * 3 == 4 * (7 * 3 * 2 * 256 * 512 * 512)


def test_fsdp_gathers_twice_and_scatters_once(compiled):
    program = analyze(compiled, "fsdp")
    weights = 7 * 2048 * 2048 * 2
    assert program.dot_flops == 7 * 3 * 2 * 1024 * 2048 * 2048
    assert kinds(program) == {
        "all-gather": 2 * weights * 7 / 8,
        "reduce-scatter": weights * 7 / 8,
    }
    assert all(collective.executions == 7 for collective in program.collectives)
    assert {collective.groups for collective in program.collectives} == {(tuple(range(8)),)}


def test_gradients_alone_travel_between_slices(compiled):
    program = analyze(compiled, "slices")
    weights = 3 * 1024 * 1024 * 2
    far = [collective for collective in program.collectives if collective.crosses(8)]
    near = [collective for collective in program.collectives if not collective.crosses(8)]
    assert {collective.kind for collective in far} == {"all-reduce"}
    # Each device has an eighth of the sum, and the two slices exchange it.
    assert sum(collective.wire_bytes for collective in far) == 2 * (weights / 8) * 1 / 2
    assert {collective.kind for collective in near} == {"all-gather", "reduce-scatter"}
    assert sum(collective.wire_bytes for collective in near) == 3 * weights * 7 / 8
    assert program.dot_flops == 3 * 3 * 2 * 512 * 1024 * 1024


def test_products_in_loops_of_permutes_are_counted_once(compiled):
    """The loop over shards steps by two, so its last number is not how often it turns."""
    program = analyze(compiled, "windowed")
    assert set(kinds(program)) == {"collective-permute"}
    assert program.dot_flops == 7 * 3 * 2 * 1024 * 2048 * 2048


def test_a_kernel_in_a_scan_runs_once_a_layer(compiled):
    program = analyze(compiled, "splash")
    executions = [(kernel.function, kernel.executions) for kernel in program.kernels]
    assert sorted(executions) == [
        ("splash_mha_dkv_no_residuals", 3),
        ("splash_mha_fwd_residuals", 3),
        ("splash_mha_fwd_residuals", 3),  # again for the gradient
    ]
    for kernel in program.kernels:
        assert hlo.ArrayType("bf16", (4, 512, 128)) in kernel.operands
        assert "block_" in kernel.metadata


def test_no_array_of_attention_scores_is_made(compiled):
    shapes = [buffer.array.shape for buffer in analyze(compiled, "splash").largest]
    assert shapes
    assert not any(shape[-2:] == (512, 512) for shape in shapes)
