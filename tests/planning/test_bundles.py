"""Kernels' machine code: an excerpt that is counted by hand, then code that libtpu makes."""

import pytest

from lumina_jax.planning import bundles, hlo
from lumina_jax.planning.chips import Topology
from lumina_jax.planning.kernels import machine_code

# A grid of 2 x 4 steps in 10 iterations: 1 bundle ahead of the loop and 1 behind; 16 that always
# run, with 4 delay slots behind each branch; 9 of every step, and 2 of the first step in a row.
CODE = """\
     0   :  { %s1_s1 = smov.u32 0 /* copy for cssa */ }
   0x1 LB: > { %s2_s2 = sphi %s1_s1, %s9_s9 /* iteration index, stage = 0 */ } /* Start region 1 */
   0x2   : > { %s3_s3 = sadd.s32 4294967295, %s2_s2  ;;  %7 = dma.hbm_to_vmem /* base_bounds: (2, 4)
iteration_bounds: (2, 4)
second_minor_factor: 1 */ }
   0x3   : > { %p1_p1 = scmp.ge.s32.totalorder %s2_s2, 1 }
   0x4   : > { %p2_p2 = scmp.lt.s32.totalorder %s2_s2, 9  ;;  %p3_p3 = pnand %p2_p2, %p1_p1 }
   0x5   : > { %9 = sbr.rel (%p3_p3) target = $region5 }
   0x6   : > { %8 = sst [smem:[#allocation5_spill]] %s3_s3 }
   0x7   : > { %s5_s5 = sld [smem:[#allocation5_spill]] }
   0x8   :  {}
   0x9   :  {} /* End region 2 */
   0xa   : > { %s4_s4 = sand.u32 3, %s5_s5 /* smod.u32 w/div 4 */  ;;  CONDITION }
   0xb   : > { %10 = sbr.rel (%p4_p4) target = $region3 }
   0xc   :  {}
   0xd   :  {}
   0xe   :  {}
   0xf   :  {}
  0x10   : > { %11 = vst [vmem:[%s6_s6]] %v1_v1 }
  0x11   : > { %12 = vst [vmem:[%s6_s6 + $0x8]] %v1_v1 }
  0x12 PF: > { %v2_v2 = vld [vmem:[%s6_s6]] } /* Start/End empty region 3 :: Start region 4 */
  0x13   : > { %v3_v3 = vexp2.f32 %v2_v2 }
  0x14   : > { %13 = vst [vmem:[%s7_s7]] %v3_v3 } /* End region 4 */
  0x15 PF: > { %s9_s9 = sadd.s32 1, %s2_s2 } /* Start/End empty region 5 */
  0x16   : > { %p9_p9 = scmp.ge.s32.totalorder %s9_s9, 10 /* loop exit test */ }
  0x17   :  { %14 = sbr.rel (!%p9_p9) target = $region1 }
  0x18   :  {}
  0x19   :  {}
  0x1a   :  {}
  0x1b   :  {}
  0x1c   :  { %15 = sfence } /* exit bundle: kernel.1 */
"""
FIRST = "%p4_p4 = scmp.ne.s32.totalorder %s4_s4, 0"
DATA = "%s8_s8 = sld [smem:[#allocation4 + %s3_s3]]  ;;  %p4_p4 = scmp.le.s32.totalorder %s8_s8, 0"


def count(path) -> dict[str, bundles.Bundles]:
    """The kernels of a compiled program for v5e."""
    kernels = hlo.analyze(path.read_text()).kernels
    code = machine_code(kernels, Topology.parse("v5e:2x4"), {})
    return {kernel.name: bundles.parse(kernel.name, code[kernel.code]) for kernel in kernels}


def test_a_region_counts_as_often_as_the_grid_enters_it():
    read = bundles.parse("kernel.1", CODE.replace("CONDITION", FIRST))
    assert (read.grid, read.steps, read.code) == ((2, 4), 8, 29)
    assert read.step == 16 + 9
    assert read.cycles == 2 + 10 * 16 + 8 * 9 + 2 * 2
    assert read.unknown == 0


def test_a_region_that_depends_on_data_counts_always_and_is_reported():
    read = bundles.parse("kernel.1", CODE.replace("CONDITION", DATA))
    assert read.cycles == 2 + 10 * 16 + 8 * (9 + 2)
    assert read.unknown == 1


def test_code_without_a_grid_runs_once():
    text = CODE.replace("CONDITION", FIRST).replace("iteration_bounds", "other_bounds")
    read = bundles.parse("kernel.1", text.replace("sbr.rel (!%p9_p9)", "nop (!%p9_p9)"))
    assert (read.grid, read.steps) == ((), 1)


def test_a_loop_that_does_not_fit_the_grid_is_an_error():
    text = CODE.replace("iteration_bounds: (2, 4)", "iteration_bounds: (3, 4)")
    with pytest.raises(ValueError, match=r"turns 10 times, which does not fit the grid \(3, 4\)"):
        bundles.parse("kernel.1", text)


def test_kernels_are_found_and_their_rare_regions_and_loops_counted(compiled):
    program = hlo.analyze((compiled / "kernels.hlo").read_text())
    read = count(compiled / "kernels.hlo")
    names = {kernel.function: kernel.name for kernel in program.kernels}
    plain, summed = read[names["double_exp"]], read[names["row_sum"]]
    registers = 256 * 512 // 1024  # of 8 x 128 float32, one exponential of one a cycle

    assert plain.grid == summed.grid == (4, 4)
    assert plain.unknown == summed.unknown == 0
    assert registers < plain.step < 3 * registers
    assert 16 * plain.step <= plain.cycles < 1.1 * 16 * plain.step
    assert 11 * registers < summed.step < 14 * registers
    # Beside its steps: four times zeros are written, four times the result, one register a cycle.
    assert 8 * registers <= summed.cycles - 16 * summed.step < 11 * registers


def test_the_mask_is_all_that_is_unknown_of_splash_attention(compiled):
    read = count(compiled / "splash.hlo")
    assert {kernel.unknown for kernel in read.values()} == {1}
    forward, again, backward = sorted(kernel.cycles for kernel in read.values())
    assert forward <= again < backward
    # The products alone, 128 x 128 x 8 in a cycle of each of the four matrix units.
    steps, product = 4 * 2 * 2, 256 * 256 * 128 / (4 * 128 * 128 * 8)
    assert forward > 2 * steps * product
    assert backward > 5 * steps * product
