"""What compiled code asks of a multiprocessor, from a few lines of it."""

from __future__ import annotations

from moeserve.kernels.triton.instructions import profile, slots_of

CODE = """
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;  /* 0x00000a */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FADD R8, R4, R5 ;
        /*0030*/                   IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, R8 ;
        /*0040*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/               @P1 BRA 0x20 ;
        /*0060*/                   STG.E desc[UR4][R2.64], R8 ;
        /*0070*/                   EXIT ;
        /*0080*/                   MUFU.RCP R1, R1 ;
        /*0090*/                   BRA 0x90;
"""


def test_loops_are_told_from_what_is_done_once() -> None:
    found = profile(CODE)
    (loop,) = found.loops
    assert loop.products == 16 * 8 * 32 + 64 * 256 * 16 / 4
    assert found.group
    assert loop.slots == 4  # an addition, two products, a branch
    assert found.straight.slots == 2 + 4 + 4 + 1  # what is behind the exit is left out
    assert found.slots(3 * loop.products) == 3 * loop.slots + found.straight.slots
    assert slots_of("MUFU.EX2") > slots_of("I2FP.F32.S32") > slots_of("FFMA")
