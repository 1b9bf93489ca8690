"""CLIP from both layouts: the same arrays, published shapes in full size, its tokenizer, its licence, and refusals in one line."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from convert import clip, store
from convert.__main__ import main as convert_main
from convert.clip_tokenizer import find_tokenizer, read_tokenizer
from convert.export import entries
from convert.licence import UNKNOWN, licence_of
from convert.mapping import lazy_arrays, plan
from rfl_jax.errors import UserError
from rfl_jax.models.clip import AESTHETIC_HEAD, VIT_H_14, VIT_L_14
from rfl_jax.models.weights import flat_shapes, get_arrays
from tests.clips import HEAD, SMALL, config_json, open_clip_names, publish, random_head, random_state, tokenizer_files

TOLD = {"vision_heads": SMALL.vision_heads, "text_heads": SMALL.text_heads, "quick_gelu": True}


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    convert_main()


def layer(prefix, width, ffn):
    """Keys and shapes of one layer in transformers' naming."""
    found = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        found |= {f"{prefix}.self_attn.{name}.weight": (width, width), f"{prefix}.self_attn.{name}.bias": (width,)}
    for name in ("layer_norm1", "layer_norm2"):
        found |= {f"{prefix}.{name}.weight": (width,), f"{prefix}.{name}.bias": (width,)}
    found |= {f"{prefix}.mlp.fc1.weight": (ffn, width), f"{prefix}.mlp.fc1.bias": (ffn,)}
    return found | {f"{prefix}.mlp.fc2.weight": (width, ffn), f"{prefix}.mlp.fc2.bias": (width,)}


def published(vision, text, projection):
    """Keys and shapes in transformers' naming, by (width, layers) of both towers: 224 pixels in patches of 14, 49,408 tokens."""
    (seen, seen_layers), (read, read_layers) = vision, text
    found = {
        "logit_scale": (),
        "vision_model.embeddings.class_embedding": (seen,),
        "vision_model.embeddings.patch_embedding.weight": (seen, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, seen),
        "vision_model.pre_layrnorm.weight": (seen,),
        "vision_model.pre_layrnorm.bias": (seen,),
        "vision_model.post_layernorm.weight": (seen,),
        "vision_model.post_layernorm.bias": (seen,),
        "text_model.embeddings.token_embedding.weight": (49408, read),
        "text_model.embeddings.position_embedding.weight": (77, read),
        "text_model.final_layer_norm.weight": (read,),
        "text_model.final_layer_norm.bias": (read,),
        "visual_projection.weight": (projection, seen),
        "text_projection.weight": (projection, read),
    }
    for i in range(seen_layers):
        found |= layer(f"vision_model.encoder.layers.{i}", seen, 4 * seen)
    for i in range(read_layers):
        found |= layer(f"text_model.encoder.layers.{i}", read, 4 * read)
    return found


FULL = {
    "ViT-L/14": (published((1024, 24), (768, 12), 768), VIT_L_14, 427_616_513),
    "ViT-H/14": (published((1280, 32), (1024, 24), 1024), VIT_H_14, 986_109_441),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_shapes_fit_in_both_layouts(name):
    shapes, cfg, parameters = FULL[name]
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
    told = {"quick_gelu": cfg.quick_gelu}
    assert clip.infer_config(shapes, told) == cfg
    target = flat_shapes(nnx.eval_shape(lambda: clip.COMPONENT.build(cfg)))
    rules = clip.NAMINGS["transformers"]
    assignments = plan(rules, shapes, target, what=name)
    assert {a.key for a in assignments} == shapes.keys()
    arrays = lazy_arrays(assignments, target, lambda key, index: pytest.fail("read"), lambda _: np.dtype(np.float16))
    for naming, other in clip.NAMINGS.items():
        exported = {e.key: e.shape for e in entries(arrays, other)}
        assert clip.naming(exported) == naming
        assert clip.infer_config(exported, told) == cfg
        plan(other, exported, target, what=naming)
        if naming == "transformers":
            assert exported == shapes


def test_the_aesthetic_predictors_widths_are_its_keys():
    shapes = FULL["ViT-L/14"][0]
    sizes = zip((0, 2, 4, 6, 7), AESTHETIC_HEAD, AESTHETIC_HEAD[1:], strict=False)
    for i, d_in, d_out in sizes:
        shapes = shapes | {f"layers.{i}.weight": (d_out, d_in), f"layers.{i}.bias": (d_out,)}
    assert clip.infer_config(shapes, {"quick_gelu": True}).head == AESTHETIC_HEAD


def test_both_layouts_give_the_same_arrays(tmp_path):
    torch = pytest.importorskip("torch")
    state = random_state()
    publish(tmp_path / "first", state)
    # As transformers wrote it for years.
    positions = {"text_model.embeddings.position_ids": np.arange(SMALL.text_len)[None]}
    save_file(state | positions, tmp_path / "first" / "model.safetensors")
    first = clip.load(tmp_path / "first")
    other = {key: torch.from_numpy(np.array(x)) for key, x in open_clip_names(state).items()}
    torch.save({"epoch": 1, "state_dict": other}, tmp_path / "HPS_v2.1_compressed.pt")
    second = clip.load(tmp_path / "HPS_v2.1_compressed.pt", **TOLD)
    assert first.cfg == second.cfg == SMALL
    found = get_arrays(second)
    for name, x in get_arrays(first).items():
        np.testing.assert_array_equal(x, found[name], err_msg=name)
    # open_clip's own weights have the exact GELU.
    told = {name: TOLD[name] for name in ("vision_heads", "text_heads")}
    assert not clip.load(tmp_path / "HPS_v2.1_compressed.pt", **told).cfg.quick_gelu


def test_parts_of_a_fused_projection_are_read_alone(tmp_path):
    save_file(open_clip_names(random_state()), tmp_path / "model.safetensors")
    checkpoint = clip.Unfused([tmp_path / "model.safetensors"])
    key = "visual.transformer.resblocks.1.attn.k.weight"
    want = random_state()["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    assert np.array_equal(checkpoint.read(key), want)
    assert np.array_equal(checkpoint.read(key, (slice(3, 9), slice(2, 5))), want[3:9, 2:5])
    assert checkpoint.name(key).endswith("model.safetensors: visual.transformer.resblocks.1.attn.in_proj_weight")


def test_the_command_converts_with_head_and_tokenizer_and_tells_the_licence(tmp_path, monkeypatch, capsys):
    source, folder = tmp_path / "openai--clip-vit-tiny", tmp_path / "converted"
    publish(source, random_state())
    head = tmp_path / "head.safetensors"
    save_file(random_head(), head)
    command(monkeypatch, "clip", "--src", source / "model.safetensors", head, "--dst", folder)
    told = capsys.readouterr().out
    assert (
        f"licence: OpenAI's CLIP by its name: MIT (openai/CLIP's LICENSE; its model card calls deployment out of scope); {UNKNOWN}"
        in told
    )
    assert licence_of(str(folder)).endswith(UNKNOWN)
    model = store.open_component("clip", [str(folder)])
    assert model.cfg.head == (12, 10, 8, 6, 4, 1)
    x = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    want, tensors = x, random_head()
    for i in HEAD:
        want = want @ tensors[f"layers.{i}.weight"].T + tensors[f"layers.{i}.bias"]
    np.testing.assert_allclose(model.rate(jnp.asarray(x)), want, rtol=1e-4, atol=1e-4)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("Person").tokens[0] == "<|startoftext|>"
    command(monkeypatch, "inspect", folder)
    assert "component   clip" in capsys.readouterr().out


def test_without_a_tokenizer_the_command_says_so(tmp_path, monkeypatch, capsys):
    save_file(random_state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json()))
    command(monkeypatch, "clip", "--src", tmp_path / "model.safetensors", "--dst", tmp_path / "out")
    assert "no tokenizer beside the weights" in capsys.readouterr().out
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    tokenizer_files(tmp_path / "words")
    named = ("--tokenizer", tmp_path / "words")
    command(monkeypatch, "clip", "--src", tmp_path / "model.safetensors", "--dst", tmp_path / "two", *named)
    assert (tmp_path / "two" / "tokenizer.json").exists()


def test_a_conversion_is_verified_against_transformers(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    publish(tmp_path / "one", random_state())
    save_file(open_clip_names(random_state()), tmp_path / "open_clip.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json()))
    for i, source in enumerate((tmp_path / "one", tmp_path / "open_clip.safetensors")):
        command(monkeypatch, "clip", "--src", source, "--dst", tmp_path / f"out{i}", "--verify")
        lines = [
            line for line in capsys.readouterr().out.splitlines() if "largest difference from transformers" in line
        ]
        assert [line.split(":")[0] for line in lines] == ["image", "text"]
        assert all(float(line.split("transformers ")[1].split()[0]) < 1e-4 for line in lines)


def test_pairs_and_tokenizer_json_read_texts_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer_files(tmp_path)
    text = read_tokenizer(tmp_path, SMALL.vocab, SMALL.text_len)
    ours = Tokenizer.from_str(text)
    words = json.loads((tmp_path / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (tmp_path / "merges.txt").read_text().splitlines()[1:]]
    theirs = transformers.CLIPTokenizer(vocab=words, merges=merges)
    for sentence in ("a Person  pe,'s so on", "", "kkk\u00e9 \n 12 a's", "PERSON " * 20):
        want = theirs(sentence, padding="max_length", truncation=True, max_length=SMALL.text_len)
        assert ours.encode(sentence).ids == want["input_ids"]
    (tmp_path / "tokenizer.json").write_text(text)
    assert read_tokenizer(tmp_path / "tokenizer.json", SMALL.vocab, SMALL.text_len) == text
    assert find_tokenizer([str(tmp_path / "model.safetensors")]) == str(tmp_path)


@pytest.mark.parametrize(
    ("change", "told", "message"),
    [
        ({"text_model.bias": np.zeros(3, np.float32)}, TOLD, "unexpected tensor text_model.bias"),
        ({"visual_projection.weight": None}, TOLD, "missing tensor for vision.projection.kernel"),
        ({"text_model.encoder.layers.1.mlp.fc1.bias": None}, TOLD, "missing tensor for text.blocks.up.bias of layer 1"),
        ({"vision_model.pre_layrnorm.bias": np.zeros(3, np.float32)}, TOLD, r"pre_layrnorm.bias has shape \[3\], expected one that gives \[24\]"),
        ({}, {}, "quick_gelu is not told by weights"),
        ({}, {"quick_gelu": True}, "vision_heads of the width 24 is not known, expected a config.json"),
        ({}, {**TOLD, "text_heads": 3}, "text_heads=3 does not divide the width 16"),
        ({}, {**TOLD, "quick_gelu": 1}, "--set: quick_gelu=1, expected True or False"),
        ({"layers.0.weight": np.zeros((4, 12), np.float32)}, TOLD, "missing tensor for head.0.bias"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, change, told, message):
    state = {key: x for key, x in (random_state() | change).items() if x is not None}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message) as refused:
        clip.COMPONENT.convert([tmp_path / "model.safetensors"], **told)
    assert "\n" not in str(refused.value)


def test_odd_files_beside_the_weights_are_refused(tmp_path):
    publish(tmp_path, random_state())
    told = config_json()
    told["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="hidden_act is gelu and quick_gelu, expected quick_gelu or gelu in both"):
        clip.COMPONENT.convert([tmp_path])
    with pytest.raises(UserError, match=r"ends texts with <\|endoftext\|>, the last of 25 tokens"):
        read_tokenizer(tmp_path, 25, 8)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nx y\n")
    with pytest.raises(UserError, match=r"vocab.json, merges.txt: expected CLIP's vocabulary and merges"):
        read_tokenizer(tmp_path, SMALL.vocab, SMALL.text_len)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: expected a Hugging Face tokenizer.json"):
        read_tokenizer(tmp_path, SMALL.vocab, SMALL.text_len)
    with pytest.raises(UserError, match=r"expected a tokenizer.json, or a folder with one"):
        read_tokenizer(tmp_path / "nowhere", SMALL.vocab, SMALL.text_len)
    fused = {"visual.proj": np.zeros(3, np.float32), "a.attn.in_proj_bias": np.zeros(4, np.float32)}
    save_file(fused, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"in_proj_bias has shape \[4\], expected queries, keys and values"):
        clip.Unfused([tmp_path / "model.safetensors"])


NAMED = {
    "models--xswu--HPSv2/snapshots/1/HPS_v2.1_compressed.pt": "HPS v2 by its name: Apache-2.0",
    "models--yuvalkirstain--PickScore_v1/snapshots/1/model.safetensors": "PickScore by its name: its code is MIT",
    "models--openai--clip-vit-large-patch14/snapshots/1/model.safetensors": "OpenAI's CLIP by its name: MIT",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K/open_clip_pytorch_model.bin": "LAION's CLIP by its name: MIT",
    "mine/model.safetensors": UNKNOWN,
}


@pytest.mark.parametrize("name", NAMED)
def test_licences_are_told_by_names(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"of no known file")
    assert licence_of(str(file)).startswith(NAMED[name])
    # A folder of shards likewise.
    assert licence_of(str(file.parent)).startswith(NAMED[name])
