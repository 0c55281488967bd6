"""The numbers of a program, on one small enough to count by hand."""

import jax
import pytest

from lumina_jax.planning import describe, hlo, report
from lumina_jax.planning.bundles import Bundles
from lumina_jax.planning.chips import Topology
from lumina_jax.planning.hlo_text import ArrayType
from lumina_jax.planning.programs import Lowered

# As libtpu 0.0.52 said it of programs that are too large, but for the names of operands.
HBM = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (132.18G) exceeds available HBM (15.75G). HLO module: "
    "jit_train_step.\nSee https://openxla.org/xla/errors/error_1000 for more details."
)
SCOPED = (
    "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem "
    "while allocating on stack for %shard_map.12 = f32[4096,4096]{1,0:T(8,128)} "
    'custom-call(%param.1), custom_call_target="tpu_custom_call", '
    'metadata={op_name="jit(f2)/shard_map/pallas_call" stack_frame_id=5}. Scoped allocation with '
    "size 64.00M and limit 16.00M exceeded scoped vmem limit by 48.00M. It should not be possible "
    "to run out of scoped vmem - \nSee https://openxla.org/xla/errors/error_1001 for more details."
)
VMEM = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space vmem. "
    "Used 256.00M of 128.00M vmem. Exceeded vmem capacity by 128.00M.\n\nProgram vmem requirement "
    "256.00M:\n    scoped          256.00M\n\n  Largest program allocations in vmem:\n\n  1. Size: "
    '128.00M\n     Operator: op_name="jit(f)/shard_map/pallas_call"\n'
)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (HBM, "needs 132.18 GiB of HBM, has 15.75 GiB"),
        (HBM.replace("132.18G", "34.02T"), "needs 34836.48 GiB of HBM, has 15.75 GiB"),
        (
            SCOPED,
            "needs 64.00 MiB of scoped vector memory in jit(f2)/shard_map/pallas_call, "
            "has 16.00 MiB",
        ),
        (
            VMEM,
            "needs 256.00 MiB of vector memory in jit(f)/shard_map/pallas_call, has 128.00 MiB",
        ),
    ],
)
def test_what_does_not_fit_says_what_it_needs_and_what_there_is(message, told):
    assert str(report.does_not_fit(message)) == told


@pytest.mark.parametrize("message", ["INTERNAL: Used 2G of 1G hbm", "RESOURCE_EXHAUSTED: quota"])
def test_other_errors_are_no_matter_of_memory(message):
    assert report.does_not_fit(message) is None


def array(dtype, *shape):
    return ArrayType(dtype, shape)


def collective(kind, groups, *, asynchronous=False, fake_gather=False, executions=1):
    """Of one million bytes."""
    return hlo.Collective(
        kind=kind, name="", op_name="", arrays=(array("bf16", 500_000),), groups=groups,
        executions=executions, asynchronous=asynchronous, fake_gather=fake_gather,
    )  # fmt: skip


def kernel(name, *operands):
    return hlo.Kernel(
        name=name,
        op_name="",
        metadata="",
        code="",
        config="",
        operands=operands,
        results=(),
        executions=3,
    )


def numbers(*, collectives=(), kernels=(), largest=(), cycles=0):
    """Of a program with products of 1e11 operations, which are estimated to take 1.5e6 cycles."""
    cost = hlo.Cost(name="", op_name="", kind="dots", results=(), cycles=1_500_000, executions=2)
    program = hlo.Program(
        dot_flops=100_000_000_000, costs=(cost,), collectives=collectives, kernels=kernels,
        host_bytes=hlo.HostTraffic(1_000_000, 2_000_000), conditionals=0,
        largest=tuple(hlo.Buffer(each, "", "") for each in largest),
    )  # fmt: skip
    lowered = Lowered(
        name="train", lowered=jax.jit(lambda x: x).lower(1.0), flops=8 * 197e9, num_images=16,
        inputs={}, sequences=(336, 512), compiler_options={},
    )  # fmt: skip
    bundles = {
        k.name: Bundles(name=k.name, grid=(), code=0, step=0, cycles=cycles, unknown=0)
        for k in kernels
    }
    return report.operations(lowered, Topology.parse("2*v5e:2x2"), program, bundles)


def test_traffic_is_split_by_network_kind_and_waiting():
    """Groups of two send half of what is gathered, groups of four three quarters."""
    found = numbers(
        collectives=(
            collective("all-gather", ((0, 1), (2, 3)), asynchronous=True, executions=4),
            collective("all-gather", ((0, 1, 2, 3),)),
            collective("reduce-scatter", ((0, 1, 2, 3),)),
            collective("all-reduce", ((0, 1),), fake_gather=True),
            collective("all-reduce", ((0, 4), (1, 5))),
        )
    )
    assert found["ici_all_gather_gb"] == pytest.approx(2.75e-3)
    assert found["ici_reduce_scatter_gb"] == pytest.approx(0.75e-3)
    assert found["ici_all_reduce_gb"] == found["fake_gather_gb"] == pytest.approx(1e-3)
    assert found["ici_gb"] == pytest.approx(4.5e-3)
    assert found["ici_sync_gb"] == pytest.approx(2.5e-3)
    assert found["dcn_gb"] == found["dcn_sync_gb"] == pytest.approx(1e-3)
    assert found["gather_asynchronous"] == pytest.approx(2 / 2.75)
    assert found["ici_seconds"] == pytest.approx(4.5e6 / 180e9)
    assert found["waiting_seconds"] == pytest.approx(2.5e6 / 180e9 + 1e6 / 3.1e9)
    assert found["host_gb"] == pytest.approx(3e-3)


def test_time_is_cycles_and_bundles_at_the_clock_and_mfu_what_was_asked_for():
    """One chip is asked for 197e9 operations, a millisecond of its peak."""
    queries, keys = array("bf16", 2, 4, 512, 64), array("bf16", 2, 2, 512, 64)
    products = 3 * 2 * 4 * 2 * 512 * 512 * 64  # in three executions, one product of each head
    found = numbers(
        kernels=(
            kernel("flash_forward.2", queries, keys, keys, array("f32", 2, 1, 512)),
            kernel("flash_backward.1.clone", queries, keys, keys),
            kernel("mystery", queries),
        ),
        cycles=100_000,
    )
    assert found["kernels_tflop"] == 7 * products / 1e12
    assert found["flops_ratio"] == pytest.approx((1e11 + 7 * products) / 197e9)
    assert found["kernels_of_unknown_tflop"] == 1
    assert found["dots_seconds"] == pytest.approx(1e-3)
    assert found["kernels_seconds"] == pytest.approx(9 * 1e5 / 1.5e9)
    assert found["step_seconds"] == pytest.approx(1e-3 + 6e-4)
    assert found["mfu"] == pytest.approx(1 / 1.6)
    assert found["images_per_second"] == pytest.approx(16 / 1.6e-3)
    assert found["roofline_seconds"] == pytest.approx((1e11 + 7 * products) / 197e12)


def test_scores_in_memory_are_found_also_where_tokens_are_filled_up():
    largest = [
        array("bf16", 2, 4, 336, 336),
        array("f32", 384, 384),
        array("f32", 1, 1),
        array("f32", 336),
        array("bf16", 512, 256),
    ]
    assert numbers(largest=largest)["score_buffers"] == 2


def test_numbers_are_written_with_three_digits():
    written = [describe.number(x) for x in (123456.7, 99.94, 1.2345, 0.012345, 0.0)]
    assert written == ["123,457", "99.9", "1.23", "0.0123", "0"]


def test_a_stage_is_told_in_days_and_chip_hours():
    told = describe.stage(1.8, 40_000, 256, price=1.2)
    assert told.strip() == (
        "the stage  40,000 steps: 0.833 days, 5,120 chip-hours, 6,144 at 1.2 a chip-hour"
    )


def test_the_peak_is_that_of_the_device_also_where_the_host_keeps_more(compiled):
    kept, offloaded = (
        int((compiled / f"{name}.peak").read_text()) for name in ("kept", "offloaded")
    )
    of_all_layers, arguments = 12 * 8192 * 512 * 2, (8192 + 12 * 512) * 512 * 2
    assert of_all_layers + arguments < kept < 1.6 * of_all_layers + arguments
    assert arguments < offloaded < arguments + of_all_layers / 2
