"""Adapters as other tools leave them: their scale, their expert, their names; what is doubtful is refused by name."""

import json

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from convert import adapters, dit, lora
from convert.mapping import flat_shapes, unfill
from rfl_jax.errors import UserError
from rfl_jax.models.wan.config import DiTConfig
from rfl_jax.models.weights import get_arrays

CFG = DiTConfig(
    in_dim=20, out_dim=8, dim=48, ffn_dim=56, num_heads=2, num_layers=2, freq_dim=32, text_dim=24, text_len=10
)
RANK = 3
Q, K = "blocks.0.self_attn.q", "blocks.1.cross_attn.k"
THEIRS = {Q: "blocks.0.attn1.to_q", K: "blocks.1.attn2.to_k"}


@pytest.fixture(scope="module")
def shapes():
    return flat_shapes(nnx.eval_shape(lambda: dit.build(CFG)))


def pair(module, pattern="diffusion_model.{}.lora_{}.weight", rank=RANK, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, 48)).astype(np.float32), rng.normal(size=(48, rank)).astype(np.float32)
    halves = ("down", "up") if "unet" in pattern or ".lora." in pattern else "AB"
    name = module.replace(".", "_") if "unet" in pattern else module
    return {pattern.format(name, halves[0]): a, pattern.format(name, halves[1]): b}


@pytest.fixture
def opened(tmp_path, shapes):
    """Opens tensors as a file of adapters; gives the scales by the original's names of layers."""

    def open_file(tensors, metadata=None, name="lora.safetensors", expert="", **sidecar):
        save_file({k: np.ascontiguousarray(x) for k, x in tensors.items()}, tmp_path / name, metadata)
        config = tmp_path / "adapter_config.json"
        config.unlink(missing_ok=True)
        if sidecar:
            config.write_text(json.dumps(sidecar))
        found = lora.Lora(tmp_path / name, dit.NAMINGS, shapes, expert)
        rules = {rule.target: rule for rule in dit.NAMINGS["original"]}
        return {
            rules[target].key(layer).removesuffix(".weight"): delta.scale
            for (target, layer), delta in found.deltas.items()
        }

    return open_file


PEFT = "base_model.model.{}.lora_{}.weight"
DIFFUSERS = "transformer.{}.lora_{}.weight"


def header(content, component="transformer"):
    return {"lora_adapter_metadata": json.dumps({f"{component}.{key}": value for key, value in content.items()})}


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"r": 3, "lora_alpha": 12}, {Q: 4.0, K: 4.0}),
        ({"r": 3, "lora_alpha": 12, "use_rslora": True}, {Q: 12 / 3**0.5, K: 12 / 3**0.5}),
        ({"r": 3, "lora_alpha": 12, "alpha_pattern": {"to_k": 6}}, {Q: 4.0, K: 2.0}),
        ({"r": 3, "lora_alpha": 12, "alpha_pattern": {"^blocks.0.attn1.to_q": 6}}, {Q: 2.0, K: 4.0}),
        ({"r": 8, "lora_alpha": 12, "rank_pattern": {"to_q": 3, "attn2.to_k": 3}}, {Q: 4.0, K: 4.0}),
    ],
)
def test_the_scale_is_peft_and_diffusers_own(settings, want, opened, tmp_path):
    """The same file in both libraries: the scale of every layer is theirs."""
    torch = pytest.importorskip("torch")
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    target = {"target_modules": sorted(THEIRS.values())}
    tensors = {k: x for i, m in enumerate((Q, K)) for k, x in pair(THEIRS[m], DIFFUSERS, seed=i).items()}
    as_peft = {key.replace("transformer.", "base_model.model."): x for key, x in tensors.items()}
    assert opened(tensors, header(settings | target)) == pytest.approx(want)
    assert opened(as_peft, None, "adapter_model.safetensors", peft_type="LORA", **settings, **target) == (
        pytest.approx(want)
    )

    def model():
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=20, out_channels=8, text_dim=24, freq_dim=32,
            ffn_dim=56, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        )  # fmt: skip

    def scales(model, name):
        found = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "scaling")}
        return {module: found[theirs].scaling[name] for module, theirs in THEIRS.items()}

    assert scales(peft.PeftModel.from_pretrained(model(), str(tmp_path)), "default") == pytest.approx(want)
    first = model()
    # Settings go with the tensors, as load_lora_weights passes them on.
    metadata = {f"transformer.{key}": value for key, value in (settings | target).items()}
    state = {key: torch.from_numpy(x) for key, x in tensors.items()}
    first.load_lora_adapter(state, prefix="transformer", metadata=metadata, adapter_name="one")
    assert scales(first, "one") == pytest.approx(want)


@pytest.mark.parametrize(
    ("metadata", "want"),
    [
        ({"alpha": "12"}, 4.0),
        ({"alpha": "12", "rank": "3"}, 4.0),
        ({"lora_alpha": "6", "r": "3"}, 2.0),
        ({"ss_network_alpha": "6", "ss_network_dim": "3"}, 2.0),
        ({"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, 1.0),
        ({"ss_network_alpha": "0", "ss_network_dim": "3"}, 1.0),
        ({"lora_adapter_metadata": json.dumps({"r": 3, "lora_alpha": 6})}, 2.0),
        ({"ss_network_alpha": "6", "ss_network_args": '{"rs_lora": "True"}'}, 6 / 3**0.5),
        ({"ss_network_alpha": "6", "ss_network_args": '{"use_rslora": true, "conv_dim": 4}'}, 6 / 3**0.5),
        ({"ss_network_alpha": "6", "ss_network_args": '{"rs_lora": false}'}, 2.0),
        ({"ss_network_alpha": "6", "ss_network_args": "None"}, 2.0),
        ({"alpha": "6", "use_rslora": "true"}, 6 / 3**0.5),
        ({"format": "pt"}, 1.0),
    ],
)
def test_headers_say_the_scale(metadata, want, opened):
    assert opened(pair(Q), metadata) == {Q: pytest.approx(want)}


@pytest.mark.parametrize("flag", [{"ss_network_args": '{"rs_lora": "True"}'}, {"use_rslora": "1"}])
def test_an_alpha_of_rank_stabilised_adapters_is_over_the_rank_or_refused(flag, opened):
    def with_alpha(value, **metadata):
        return opened(pair(Q) | {f"diffusion_model.{Q}.alpha": np.float32(value)}, flag | metadata)

    # As LyCORIS writes it.
    assert with_alpha(6 * 3**0.5, ss_network_alpha="6") == {Q: pytest.approx(6 / 3**0.5)}
    with pytest.raises(UserError, match=r"q\.alpha says scale 2 .* but ss_network_alpha in the header says 3\.46"):
        with_alpha(6, ss_network_alpha="6")
    with pytest.raises(UserError, match=r"(rs_lora of ss_network_args|use_rslora) in the header says .*q\.alpha is"):
        with_alpha(6)
    with pytest.raises(UserError, match=r"lora\.safetensors: ss_network_args in the header: expected a JSON object"):
        opened(pair(Q), {"ss_network_args": "rs_lora=True"})


def test_the_settings_of_the_own_component_count(opened):
    both = {"transformer.r": 3, "transformer.lora_alpha": 6, "transformer_2.r": 3, "transformer_2.lora_alpha": 12}
    metadata = {"lora_adapter_metadata": json.dumps(both)}
    assert opened(pair(THEIRS[Q], DIFFUSERS), metadata) == {Q: 2.0}
    assert opened(pair(THEIRS[Q], "transformer_2.{}.lora_{}.weight"), metadata) == {Q: 4.0}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_an_alpha_of_any_type_is_one_number(dtype, opened):
    name = "diffusion_model.blocks.0.self_attn.q.alpha"
    assert opened(pair(Q) | {name: np.array(6, dtype)}) == {Q: 2.0}
    with pytest.raises(UserError, match=r"lora.safetensors: .*q\.alpha has shape \[2\], expected one number"):
        opened(pair(Q) | {name: np.array([6, 7], dtype)})


def test_another_files_sidecar_is_not_used(opened, capsys):
    assert opened(pair(Q), r=RANK, lora_alpha=48) == {Q: 1.0}
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "says no alpha (adapter_config.json beside it is of PEFT's files" in line
    # Said once.
    opened(pair(Q), r=RANK, lora_alpha=48)
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match=r"adapter_config\.json says rank 16 of .*q, whose tensors have rank 3"):
        opened(pair(THEIRS[Q], PEFT), r=16, lora_alpha=64)
    with pytest.raises(UserError, match=r"adapter_config\.json does not name .*to_q among its target_modules"):
        opened(pair(THEIRS[Q], PEFT), r=RANK, lora_alpha=64, target_modules=["to_k"])
    with pytest.raises(UserError, match=r"adapter_config\.json: expected PEFT's settings of a LoRA"):
        opened(pair(THEIRS[Q], PEFT), r=RANK, lora_alpha="much")


def test_places_that_disagree_are_both_named(opened):
    alpha = {"diffusion_model.blocks.0.self_attn.q.alpha": np.float32(6)}
    assert opened(pair(Q) | alpha, {"alpha": "6", "rank": "3"}) == {Q: 2.0}
    with pytest.raises(UserError, match=r"q\.alpha says scale 2 .* but alpha in the header says 4"):
        opened(pair(Q) | alpha, {"alpha": "12"})
    with pytest.raises(UserError, match=r"lora_adapter_metadata in the header says scale 4 .*_config\.json says 1"):
        opened(pair(THEIRS[Q], PEFT), header({"r": 3, "lora_alpha": 12}), r=3, lora_alpha=3)
    with pytest.raises(UserError, match=r"rank|r in the header"):
        opened(pair(Q), {"alpha": "12", "rank": "8"})
    with pytest.raises(UserError, match=r"lora\.safetensors: alpha in the header: 'much', expected a number"):
        opened(pair(Q), {"alpha": "much"})


NAMES = {
    "lora_unet__{}.lora_{}.weight": Q,
    "lora_unet_{}.lora_{}.weight": Q,
    "lora_unet__orig_mod_{}.lora_{}.weight": Q,
    "pipe.dit.{}.lora_{}.default.weight": Q,
    "module._orig_mod.{}.lora_{}.weight": Q,
    "model.diffusion_model.{}.lora_{}.weight": Q,
    "base_model.model.model.{}.lora_{}.some_name.weight": Q,
    "transformer.{}.lora.{}.weight": THEIRS[Q],
    "{}._orig_mod.lora_{}.weight": Q,
}


@pytest.mark.parametrize("pattern", NAMES)
def test_names_that_circulate_are_read(pattern, opened):
    assert opened(pair(NAMES[pattern], pattern)) == {Q: 1.0}


def test_differences_of_the_modulation_have_either_name(shapes, tmp_path):
    x = np.ones((1, 6, 48), np.float32)
    for key in ("blocks.0.modulation.diff", "blocks.0.diff_m", "blocks.0.scale_shift_table.diff"):
        save_file({f"diffusion_model.{key}": x}, tmp_path / "m.safetensors")
        assert lora.Lora(tmp_path / "m.safetensors", dit.NAMINGS, shapes).deltas.keys() == {("blocks.modulation", 0)}


def test_two_keys_for_one_tensor_are_both_named(opened):
    twice = (
        pair(Q) | pair(Q, "{}.lora_{}.weight"),
        pair(Q, "{}.lora_{}.default.weight") | pair(Q, "{}.lora_{}.weight"),
        pair(Q) | pair(THEIRS[Q], DIFFUSERS),
        pair(Q) | pair(Q, "lora_unet_{}.lora_{}.weight"),
        pair(Q) | {f"diffusion_model.{Q}.diff": np.zeros((48, 48), np.float32)},
        {f"blocks.0.{name}": np.zeros((1, 6, 48), np.float32) for name in ("diff_m", "modulation.diff")},
    )
    for tensors in twice:
        with pytest.raises(UserError, match=r"\S+ and \S+ (are both of|both change) \S+, expected one"):
            opened(tensors)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("transformer.{}.lora_{}.weight", "transformer_2.{}.lora_{}.weight"),
        ("diffusion_model.transformer_1.{}.lora_{}.weight", "diffusion_model.transformer_2.{}.lora_{}.weight"),
        ("high_noise.{}.lora_{}.weight", "low_noise.{}.lora_{}.weight"),
        ("pipe.dit.{}.lora_{}.weight", "pipe.dit2.{}.lora_{}.weight"),
    ],
)
def test_the_expert_that_is_asked_for_is_read(first, second, shapes, tmp_path):
    file = tmp_path / "both.safetensors"
    tensors = {"dit": pair(Q, first, seed=1), "dit2": pair(Q, second, seed=2)}
    save_file(tensors["dit"] | tensors["dit2"], file)
    with pytest.raises(UserError, match=r"adapters of both experts .*--expert high or --expert low"):
        lora.Lora(file, dit.NAMINGS, shapes)
    with pytest.raises(UserError, match=r"adapters of both experts"):
        adapters.convert(str(file))
    assert adapters.networks_of(str(file)) == ("dit", "dit2")
    for expert, want in tensors.items():
        (delta,) = lora.Lora(file, dit.NAMINGS, shapes, expert).deltas.values()
        assert np.array_equal(delta.factors()[0].T, next(iter(want.values())))
    save_file(tensors["dit2"], file)
    assert adapters.networks_of(str(file)) == ("dit2",)
    assert len(lora.Lora(file, dit.NAMINGS, shapes).deltas) == 1
    with pytest.raises(UserError, match=r"of the low-noise expert alone .*expected those of the high-noise expert"):
        lora.Lora(file, dit.NAMINGS, shapes, "dit")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite_are_refused_by_name(value, dtype, opened):
    tensors = {key: x.astype(dtype) for key, x in pair(Q).items()}
    key = sorted(tensors)[1]
    tensors[key][2, 1] = value
    with pytest.raises(UserError, match=rf"lora\.safetensors: {key} holds NaN or infinity"):
        opened(tensors)


FOREIGN = {
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": "Flux or HunyuanVideo LoRA in kohya naming",
    "lora_unet_input_blocks_1_1_proj_in.lora_down.weight": "Stable Diffusion LoRA in kohya naming",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "a text encoder's LoRA",
    "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": "Wan2.1 I2V LoRA in ComfyUI naming",
    "encoder.downsamples.0.residual.0.gamma": "a VAE",
    "encoder.block.0.layer.0.SelfAttention.k.weight": "a T5 text encoder",
    "diffusion_model.blocks.0.self_attn.q.lokr_w1": "LoKr",
    "diffusion_model.blocks.0.self_attn.q.dora_scale": "DoRA",
}


@pytest.mark.parametrize("key", FOREIGN)
def test_a_refusal_says_what_the_file_looks_like(key, opened):
    with pytest.raises(UserError) as error:
        opened({key: np.zeros((4, 8), np.float32)})
    assert FOREIGN[key] in str(error.value)
    assert key in str(error.value)


def test_a_refusal_of_another_width_names_the_network_and_every_fault(shapes, tmp_path):
    tensors = {
        f"lora_unet_blocks_{i}_self_attn_q.lora_{half}.weight": np.zeros(shape, np.float32)
        for i in range(30)
        for half, shape in (("down", (4, 1536)), ("up", (1536, 4)))
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(UserError) as error:
        adapters.convert(str(tmp_path / "lora.safetensors"))
    message = str(error.value)
    assert "Wan2.1 1.3B (width 1536, 30 blocks) LoRA in kohya naming" in message
    assert "more)" in message
    assert "the closest preset" in message


def test_a_folder_and_a_pickle_hold_the_same(shapes, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = pair(Q, PEFT)
    torch.save({key: torch.from_numpy(x) for key, x in tensors.items()}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 6, "peft_type": "LORA"}))
    (delta,) = lora.Lora(tmp_path, dit.NAMINGS, shapes).deltas.values()
    assert delta.scale == 2.0
    assert np.array_equal(delta.factors()[0].T, next(iter(tensors.values())))


def test_merging_says_which_expert(tmp_path):
    model = dit.build(CFG)
    save_file(
        unfill(dit.NAMINGS["original"], {k: np.asarray(x) for k, x in get_arrays(model).items()}),
        tmp_path / "base.safetensors",
    )
    first, second = pair(Q, DIFFUSERS, seed=1), pair(Q, "transformer_2.{}.lora_{}.weight", seed=2)
    first = {key.replace(Q, THEIRS[Q]): x for key, x in first.items()}
    save_file(first | second, tmp_path / "both.safetensors")
    loras, hints = [(str(tmp_path / "both.safetensors"), 1.0)], {"num_heads": 2, "text_len": 10}
    before = np.asarray(model.blocks.self_attn.q.kernel[...])[0]
    for expert, tensors in (("dit", first), ("dit2", second)):
        _, arrays = dit.COMPONENT.convert([tmp_path / "base.safetensors"], loras=loras, expert=expert, **hints)
        a, b = tensors.values()
        got = arrays["blocks.self_attn.q.kernel"][slice(0, 1), slice(None), slice(None)][0]
        np.testing.assert_allclose(got, before + (b @ a).T, atol=1e-4)
