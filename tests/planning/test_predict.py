"""A step's time adds up: cycles as often as loops run, kernels by their grids, collectives over the links that are there."""

import itertools
import math

import jax
import pytest

from rfl_jax.chips import CHIPS, Chip
from rfl_jax.errors import UserError
from rfl_jax.models.attention import TILES, tiles_for
from rfl_jax.planning.hlo import Program, collectives, group
from rfl_jax.planning.links import Links
from rfl_jax.planning.predict import KERNELS, check_predictable, predict

# A cycle a millisecond, a byte of memory or of a link a millisecond: figures below are in milliseconds.
CHIP = Chip(flops=1e6, memory=1e9, bandwidth=1e3, interconnect=6e3, links=6, ring=4, clock=1e3)


def grid(*shape):
    """Coordinates of a slice's chips, as jax lists them."""
    return [place[::-1] for place in itertools.product(*map(range, shape[::-1]))]


def milliseconds(text, shape=(2, 2, 1)):
    found = predict([Program(text)], Links(grid(*shape), CHIP), CHIP, "a chip", operations=1e3)
    return found, lambda seconds: pytest.approx(seconds / 1e3, rel=1e-9)


def worked(cycles, scope=""):
    name = f'metadata={{op_name="jit(step)/{scope}/add"}}, ' if scope else ""
    return f'{name}backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'


LOOPS = f"""HloModule jit_step, is_scheduled=true

%product (p.1: f32[8,8]) -> f32[8,8] {{
  %p.1 = f32[8,8]{{1,0}} parameter(0)
  ROOT %convolution.1 = f32[8,8]{{1,0}} convolution(%p.1, %p.1), dim_labels=bf_io->bf, {worked(999)}
}}

%less (c.1: (s32[], f32[8])) -> pred[] {{
  %c.1 = (s32[], f32[8]{{0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %limit = s32[] constant(3)
  ROOT %compare.1 = pred[] compare(%i.1, %limit), direction=LT
}}

%inner (b.1: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %b.1 = (s32[], f32[8]{{0}}) parameter(0)
  ROOT %fusion.1 = f32[8,8]{{1,0}} fusion(%b.1), kind=kOutput, calls=%product, {worked(10, "jvp(rfl.grad_steps)/while")}
}}

%outer (b.2: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %b.2 = (s32[], f32[8]{{0}}) parameter(0)
  %while.1 = (s32[], f32[8]{{0}}) while(%b.2), condition=%less, body=%inner
  %copy.1 = f32[8]{{0}} copy(%b.2), {worked(1)}
  ROOT %add.1 = f32[8]{{0}} add(%b.2, %b.2), {worked(7, "transpose(jvp(rfl.grad_steps))/checkpoint/rematted_computation")}
}}

ENTRY %main (a.1: f32[8]) -> f32[8] {{
  %a.1 = f32[8]{{0}} parameter(0)
  %while.2 = (s32[], f32[8]{{0}}) while(%a.1), condition=%other, body=%outer, metadata={{op_name="jit(step)/transpose(jvp(rfl.grad_steps))/while"}}, backend_config={{"known_trip_count":{{"n":"5"}}}}
  %reduce.1 = f32[]{{:T(128)}} reduce(%a.1, %a.1), to_apply=%product, {worked(100, "rfl.optimizer")}
  ROOT %multiply.1 = f32[8]{{0}} multiply(%reduce.1, %a.1)
}}
"""


def test_cycles_count_as_often_as_their_loops_run_and_by_phase_pass_and_kind():
    found, exactly = milliseconds(LOOPS)
    # What has no estimate takes its bytes: 8 numbers in, 8 out, and one more.
    untimed = 8 * 4 + 8 * 4 + 4
    assert found.phases == {
        # What names no phase is of its loop's.
        "grad_steps": {"forward": exactly(150), "recomputed": exactly(35), "backward": exactly(5)},
        "optimizer": {"forward": exactly(100)},
        "other": {"forward": exactly(untimed)},
    }
    assert found.kinds["products"] == exactly(150)
    assert found.kinds["copies"] == exactly(5)
    assert found.kinds["other"] == exactly(35 + 100 + untimed)
    assert found.seconds == exactly(150 + 35 + 5 + 100 + untimed)
    assert [(part.phase, part.passed, part.kind) for part in found.largest] == [
        ("grad_steps", "forward", "products"),
        ("optimizer", "forward", "other"),
        ("other", "forward", "other"),
    ]
    # A thousand operations on a device that does a million a second.
    assert found.mfu == pytest.approx(1e-3 / found.seconds)
    assert found.notes == []


def test_a_loop_of_unknown_length_counts_once_and_is_told_of():
    found, exactly = milliseconds(LOOPS.replace("direction=LT", "direction=NE").replace('5"}}}}', '1"}}}}'))
    assert found.phases["grad_steps"]["forward"] == exactly(5 * 10)
    assert found.notes == ["a loop of grad_steps whose rounds are not known counts once"]


def test_programs_run_one_after_another_and_of_a_choice_the_longest_branch():
    text = f"""
%short (p.1: f32[8]) -> f32[8] {{
  ROOT %add.1 = f32[8]{{0}} add(%p.1, %p.1), {worked(3)}
}}

%long (p.2: f32[8]) -> f32[8] {{
  ROOT %add.2 = f32[8]{{0}} add(%p.2, %p.2), {worked(8)}
}}

ENTRY %main (a.1: s32[]) -> f32[8] {{
  %a.1 = s32[] parameter(0)
  ROOT %conditional.1 = f32[8]{{0}} conditional(%a.1, %a.1, %a.1), branch_computations={{%short, %long}}, metadata={{op_name="rfl.reward"}}
}}
"""
    found = predict([Program(text)] * 2, Links(grid(2, 2, 1), CHIP), CHIP, "a chip", operations=1e3)
    assert found.phases == {"reward": {"forward": pytest.approx(2 * 8e-3)}}


def test_a_time_is_not_predicted_for_devices_of_unknown_clock():
    with pytest.raises(UserError, match="--predict: local: expected a slice of v5e, v5p or v6e"):
        check_predictable("local", jax.devices())


def attention(name, heads, queries, keys, width=128):
    q, k = f"bf16[{heads},{queries},{width}]{{2,1,0}}", f"bf16[{heads},{keys},{width}]{{2,1,0}}"
    return f"""
ENTRY %main (q.1: {q}, k.1: {k}) -> {q} {{
  %q.1 = {q} parameter(0)
  %k.1 = {k} parameter(1)
  ROOT %{name}.2 = ({q}, f32[{heads},1,{queries}]{{2,1,0}}) custom-call(%q.1, %k.1, %k.1), custom_call_target="tpu_custom_call", metadata={{op_name="rfl.grad_steps/{name}/pallas_call"}}
}}
"""


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in KERNELS}))
def test_attention_takes_the_cycles_of_its_tiles(kind):
    chip, measured = CHIPS[kind], KERNELS[kind, TILES[0]]

    def seconds(name, *sizes):
        program = Program(attention(name, *sizes))
        found = predict([program], Links(grid(2, 2, 1), chip), chip, kind, operations=1.0)
        assert found.seconds == found.kinds["attention"]
        return found.seconds * chip.clock

    # Cores share the heads: of an odd number one core has one more.
    heads = math.ceil(5 / measured.cores)
    assert seconds("flash_forward", 5, 19 * 1024, 19 * 1024) == pytest.approx(heads * 19 * 19 * measured.forward)
    assert seconds("flash_backward", 5, 19 * 1024, 19 * 1024) == pytest.approx(heads * 19 * 19 * measured.backward)
    # The prompt's keys are half a tile; wider heads take as much more.
    assert seconds("flash_forward", 5, 5 * 1024, 512) == pytest.approx(heads * 5 * 0.5 * measured.forward)
    assert seconds("flash_backward", 5, 128, 128, 256) == pytest.approx(heads * 2 / 64 * measured.backward)
    # Many keys are cut into larger tiles.
    assert tiles_for(75_776).keys == 2048
    larger = heads * 74 * 37 * KERNELS[kind, tiles_for(75_776)].forward
    assert seconds("flash_forward", 5, 75_776, 75_776) == pytest.approx(larger)
    # More than the arithmetic at peak.
    assert seconds("flash_forward", 4, 2**14, 2**14) / chip.clock > 4 * 4 * 2**28 * 128 / chip.flops


def test_kernels_that_were_not_measured_are_told_of():
    found, exactly = milliseconds(attention("flash_backward", 2, 128, 256))
    # Five products at a peak of a thousand operations a millisecond.
    assert found.seconds == exactly(5 * 2 * 2 * 128 * 256 * 128 / 1e3)
    assert "not measured" in found.notes[0]
    found, exactly = milliseconds(attention("something", 2, 128, 256))
    assert found.seconds == exactly(2 * 2 * 128 * (128 + 256 + 256 + 128) + 4 * 2 * 128)
    assert "something.2 is not known" in found.notes[0]


@pytest.mark.parametrize(
    ("shape", "devices", "axes"),
    [
        ((2, 2, 1), None, [(2, 1), (2, 1)]),  # v5p-8: two links of six
        ((2, 4, 1), None, [(2, 1), (4, 2)]),  # rings of four and more
        ((3, 1, 1), None, [(3, 1)]),
        ((4, 4, 4), None, [(4, 2)] * 3),
        ((4, 4, 1), [0, 1], [(2, 1)]),  # half of a ring is a line
        ((4, 4, 1), [0, 4, 8, 12], [(4, 2)]),
        ((1, 1, 1), None, []),
    ],
)
def test_links_are_those_of_the_slice(shape, devices, axes):
    assert Links(grid(*shape), CHIP).axes(devices) == axes


@pytest.mark.parametrize(
    ("kind", "shape", "milliseconds"),
    [
        # Of a result of 1,200 bytes three quarters come from the others, over two links.
        ("all-gather", (2, 2, 1), 900 / 2),
        ("all-reduce", (2, 2, 1), 2 * 900 / 2),
        # The result is what is left of four times as much.
        ("reduce-scatter", (2, 2, 1), 3 * 1200 / 2),
        # Each of two halves has two chips, of which each sends two of its four parts over its link across.
        ("all-to-all", (2, 2, 1), 600),
        ("all-to-all", (3, 1, 1), 800),
        # Four chips send four of their eight parts over the two links between the halves.
        ("all-to-all", (1, 2, 5), 2 * 3 / 5 * 1200),
        ("all-to-all", (4, 1, 1), 600),
        ("collective-permute", (2, 2, 1), 1200),
        ("all-gather", (4, 1, 1), 900 / 2),
        ("all-gather", (1, 1, 1), 0),
    ],
)
def test_collectives_take_their_bytes_over_the_links(kind, shape, milliseconds):
    assert Links(grid(*shape), CHIP).seconds(kind, 1200, None) == pytest.approx(milliseconds / 1e3)


def test_groups_are_read_in_every_form():
    assert group("replica_groups={{0,2},{1,3}}, dimensions={0}") == (0, 2)
    assert group("replica_groups=[2,4]<=[8], dimensions={0}") == (0, 1, 2, 3)
    assert group("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}") == (0, 4)
    assert group("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}") == (0, 4)
    assert group("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, dimensions={0}") == (0, 1, 4, 5)
    assert group("source_target_pairs={{0,1}}") is None
    assert group("replica_groups=mesh['a'=8] {'a':(1)2}") is None


def exchange(work):
    """Two gathers of 1,200 bytes, 450 ms each over the two links, beside work of so many cycles, and one alone."""
    gather = "replica_groups={{0,1,2,3}}, dimensions={0}"
    return f"""
ENTRY %main (a.1: f32[75]) -> f32[300] {{
  %a.1 = f32[75]{{0}} parameter(0)
  %start.1 = (f32[75]{{0}}, f32[300]{{0}}) all-gather-start(%a.1), channel_id=1, {gather}
  %start.2 = (f32[75]{{0}}, f32[300]{{0}}) all-gather-start(%a.1), channel_id=1, {gather}
  %add.1 = f32[75]{{0}} add(%a.1, %a.1), {worked(work, "rfl.vae")}
  %done.1 = f32[300]{{0}} all-gather-done(%start.1), metadata={{op_name="rfl.vae"}}
  %done.2 = f32[300]{{0}} all-gather-done(%start.2), metadata={{op_name="rfl.vae"}}
  ROOT %gather.1 = f32[300]{{0}} all-gather(%a.1), channel_id=2, {gather}, metadata={{op_name="rfl.reward"}}
}}
"""


@pytest.mark.parametrize(("work", "waited"), [(2000, 0), (800, 100), (100, 800)])
def test_what_runs_beside_work_is_waited_for_where_it_takes_longer(work, waited):
    found, exactly = milliseconds(exchange(work))
    assert found.phases == {"vae": {"forward": exactly(work + waited)}, "reward": {"forward": exactly(450)}}
    assert found.kinds["collectives"] == exactly(waited + 450)
    assert found.hidden == exactly(900 - waited)
    assert collectives(Program(exchange(work)))["all-gather"].count == 3


def test_links_that_are_busy_are_waited_for():
    alone = exchange(100).replace("ROOT %gather.1", "%gather.1").split("\n")
    first = [line for line in alone if "done" not in line and "start.2" not in line]
    found, exactly = milliseconds("\n".join(first))
    # After 100 ms of work 350 of the first gather are left.
    assert found.phases["reward"]["forward"] == exactly(350 + 450)


FUSED = f"""
%begin (p.1: f32[75]) -> f32[300] {{
  %p.1 = f32[75]{{0}} parameter(0)
  %all-gather.1 = f32[300]{{0}} all-gather(%p.1), channel_id=3, replica_groups={{{{0,1,2,3}}}}, frontend_attributes={{chain_id="7"}}
  ROOT %custom-call.1 = (f32[75]{{0}}, f32[300]{{0}}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%carry (p.2: f32[75]) -> f32[300] {{
  %p.2 = f32[75]{{0}} parameter(0)
  %all-gather.2 = f32[300]{{0}} all-gather(%p.2), channel_id=3, replica_groups={{{{0,1,2,3}}}}, frontend_attributes={{chain_id="7"}}
  ROOT %convolution.2 = f32[75]{{0}} convolution(%p.2, %p.2), dim_labels=bf_io->bf
}}

%end (p.3: f32[75]) -> f32[300] {{
  %p.3 = f32[75]{{0}} parameter(0)
  %all-gather.3 = f32[300]{{0}} all-gather(%p.3), channel_id=3, replica_groups={{{{0,1,2,3}}}}, frontend_attributes={{chain_id="7"}}
  ROOT %custom-call.3 = f32[300]{{0}} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (a.1: f32[75]) -> f32[300] {{
  %a.1 = f32[75]{{0}} parameter(0)
  %fusion.1 = (f32[75]{{0}}, f32[300]{{0}}, u32[]) fusion(%a.1), kind=kCustom, calls=%begin
  %fusion.2 = f32[75]{{0}} fusion(%a.1), kind=kOutput, calls=%carry, {worked(150)}
  %fusion.3 = f32[75]{{0}} fusion(%a.1), kind=kOutput, calls=%carry, {worked(200)}
  ROOT %fusion.4 = f32[300]{{0}} fusion(%a.1), kind=kCustom, calls=%end
}}
"""


def test_a_collective_spread_over_fusions_is_one():
    found, exactly = milliseconds(FUSED)
    assert found.kinds["products"] == exactly(350)
    assert found.kinds["collectives"] == exactly(450 - 350)
    assert collectives(Program(FUSED))["all-gather"].count == 1
    assert collectives(Program(FUSED))["all-gather"].bytes == 1200


def test_copies_take_the_memory_and_those_of_the_host_are_told_of():
    text = f"""
ENTRY %main (a.1: f32[75]) -> f32[75] {{
  %a.1 = f32[75]{{0:T(128)}} parameter(0)
  %h.1 = f32[75]{{0:T(128)S(5)}} parameter(1)
  %copy-start.1 = (f32[75]{{0:T(128)S(1)}}, f32[75]{{0:T(128)}}, u32[]{{:S(2)}}) copy-start(%a.1)
  %copy-start.2 = (f32[75]{{0:T(128)}}, f32[75]{{0:T(128)S(5)}}, u32[]{{:S(2)}}) copy-start(%h.1)
  %slice-start.1 = ((f32[75]{{0:T(128)}}), f32[25]{{0:T(128)S(1)}}, u32[]{{:S(2)}}) slice-start(%a.1), slice={{[0:25]}}
  %add.1 = f32[75]{{0:T(128)}} add(%a.1, %a.1), {worked(240)}
  %copy-done.1 = f32[75]{{0:T(128)S(1)}} copy-done(%copy-start.1)
  %copy-done.2 = f32[75]{{0:T(128)}} copy-done(%copy-start.2)
  %slice-done.1 = f32[25]{{0:T(128)S(1)}} slice-done(%slice-start.1)
  %update.1 = f32[75]{{0:T(128)}} dynamic-update-slice(%add.1, %slice-done.1, %a.1)
  ROOT %gather.1 = f32[75]{{0:T(128)}} gather(%copy-done.1, %a.1)
}}
"""
    found, exactly = milliseconds(text)
    # Beside 240 cycles 300 bytes go into fast memory, then 100; the gather reads 300 and writes 300.
    assert found.kinds["copies"] == exactly(60 + 100)
    assert found.kinds["other"] == exactly(240 + 600)
    assert found.hidden == exactly(240)
    assert any("host memory" in note for note in found.notes)
    assert any("gathers" in note for note in found.notes)
