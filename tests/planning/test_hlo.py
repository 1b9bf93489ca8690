"""Collectives are read from compiled programs, as often as they run."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rfl_jax.planning.compile import read_refusal
from rfl_jax.planning.hlo import Program, collectives
from tests.devices import make_mesh

REFUSAL = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 131.77G of \
95.74G hbm. Exceeded hbm capacity by 36.03G.

Total hbm usage >= 131.77G:
    reserved        258.00M
    program         131.52G

Largest program allocations in hbm:

  1. Size: 53.22G
     Operator: op_name="jit(step)/blocks/bkns->bnkd/dot_general"
     Shape: bf16[1,40,18900,18900]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 53.22G
     XLA label: fusion.1
     Allocation type: HLO temp
     ==========================

  2. Size: 1.50G
     Shape: f32[10,20]{1,0}
     ==========================
"""


def test_a_loop_counts_its_rounds():
    mesh = make_mesh(1, 1, 8)
    split = NamedSharding(mesh, PartitionSpec("context"))

    def f(x):
        def body(x, _):
            # Every device needs every row: one gather a round.
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ x), split), None

        return jax.lax.scan(body, x, length=5)[0]

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)
    found = collectives(Program(jax.jit(f, out_shardings=split).lower(x).compile().as_text()))
    assert set(found) == {"all-gather"}
    assert found["all-gather"].count == 5
    assert found["all-gather"].bytes == 5 * 64 * 64 * 4


def test_a_sum_over_devices_is_one_reduction():
    mesh = make_mesh(1, 1, 8)
    x = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("context")))
    found = collectives(Program(jax.jit(jnp.sum).lower(x).compile().as_text()))
    assert set(found) == {"all-reduce"}
    assert (found["all-reduce"].count, found["all-reduce"].bytes) == (1, 4)


def test_a_refusal_tells_what_was_needed_and_by_what():
    needed, largest = read_refusal(REFUSAL)
    assert needed == 131.77 * 2**30
    assert largest == [
        "53.22G  bf16[1,40,18900,18900]{3,2,1,0:T(8,128)(2,1)}  dot_general",
        "1.50G  f32[10,20]{1,0}  ?",
    ]
    temporaries = "Ran out of memory on HBM, the total memory required for HLO temporaries (28.50G) exceeds available HBM (15.75G)."
    assert read_refusal(temporaries) == (28.5 * 2**30, [])
    assert read_refusal("something else") == (None, [])
