"""A small random CLIP as its publishers write one, with its tokenizer's files."""

import json

import numpy as np
from safetensors.numpy import save_file

from convert import store
from convert.clip_tokenizer import read_tokenizer
from convert.verify import clip_config
from rfl_jax.models.clip import CLIPConfig

SMALL = CLIPConfig(
    image_size=28, patch=7, vision_dim=24, vision_ffn=40, vision_heads=3, vision_layers=2,
    vocab=24, text_len=8, text_dim=16, text_ffn=32, text_heads=2, text_layers=2, projection=12, quick_gelu=True,
)  # fmt: skip
# Of the aesthetic predictor's layers, whose numbers are these.
HEAD = {0: (12, 10), 2: (10, 8), 4: (8, 6), 6: (6, 4), 7: (4, 1)}


def tokenizer_files(folder):
    """vocab.json and merges.txt of as many tokens as `SMALL` knows."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = ["a", "e", "n", "o", "p", "r", "s", "b", "k"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "pe", "pe</w>", "on</w>", "so"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == SMALL.vocab
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\np e\np e</w>\no n</w>\ns o\n")


def random_state(cfg=SMALL, seed=0):
    """The tensors of a random network in transformers' naming, by numpy: no PyTorch is needed."""
    rng = np.random.default_rng(seed)
    state = {}

    def put(key, *shape, mean=0.0):
        state[key] = (mean + rng.normal(size=shape) * 0.3).astype(np.float32)

    def norm(key, dim):
        put(f"{key}.weight", dim, mean=1.0)
        put(f"{key}.bias", dim)

    def linear(key, d_in, d_out):
        put(f"{key}.weight", d_out, d_in)
        put(f"{key}.bias", d_out)

    def tower(key, dim, ffn, layers):
        for i in range(layers):
            layer = f"{key}.encoder.layers.{i}"
            norm(f"{layer}.layer_norm1", dim)
            norm(f"{layer}.layer_norm2", dim)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{layer}.self_attn.{name}", dim, dim)
            linear(f"{layer}.mlp.fc1", dim, ffn)
            linear(f"{layer}.mlp.fc2", ffn, dim)

    state["logit_scale"] = np.array(4.5, np.float32)
    tokens = (cfg.image_size // cfg.patch) ** 2 + 1
    put("vision_model.embeddings.class_embedding", cfg.vision_dim)
    put("vision_model.embeddings.patch_embedding.weight", cfg.vision_dim, 3, cfg.patch, cfg.patch)
    put("vision_model.embeddings.position_embedding.weight", tokens, cfg.vision_dim)
    norm("vision_model.pre_layrnorm", cfg.vision_dim)
    norm("vision_model.post_layernorm", cfg.vision_dim)
    tower("vision_model", cfg.vision_dim, cfg.vision_ffn, cfg.vision_layers)
    put("text_model.embeddings.token_embedding.weight", cfg.vocab, cfg.text_dim)
    put("text_model.embeddings.position_embedding.weight", cfg.text_len, cfg.text_dim)
    norm("text_model.final_layer_norm", cfg.text_dim)
    tower("text_model", cfg.text_dim, cfg.text_ffn, cfg.text_layers)
    put("visual_projection.weight", cfg.projection, cfg.vision_dim)
    put("text_projection.weight", cfg.projection, cfg.text_dim)
    return state


def open_clip_names(state):
    """The same tensors as open_clip names and lays them out, its projections to queries, keys and values in one."""
    found = {}
    for key, x in state.items():
        name = key.replace("vision_model.encoder.layers.", "visual.transformer.resblocks.")
        name = name.replace("text_model.encoder.layers.", "transformer.resblocks.")
        for theirs, ours in (
            ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.out_proj"), ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
            ("vision_model.embeddings.patch_embedding", "visual.conv1"),
            ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
            ("vision_model.pre_layrnorm", "visual.ln_pre"), ("vision_model.post_layernorm", "visual.ln_post"),
            ("text_model.embeddings.token_embedding", "token_embedding"),
            ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
            ("text_model.final_layer_norm", "ln_final"),
        ):  # fmt: skip
            name = name.replace(theirs, ours)
        if key.endswith("projection.weight"):
            found["visual.proj" if key.startswith("visual") else "text_projection"] = np.ascontiguousarray(x.T)
        elif ".q_proj." in key:
            parts = [state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            found[name.replace("self_attn.q_proj.", "attn.in_proj_")] = np.concatenate(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            found[name] = x
    return found


def random_head(seed=1):
    """The tensors of an aesthetic predictor's head for `SMALL`."""
    rng = np.random.default_rng(seed)
    head = {f"layers.{i}.weight": rng.normal(size=shape[::-1]).astype(np.float32) for i, shape in HEAD.items()}
    return head | {f"layers.{i}.bias": rng.normal(size=shape[1]).astype(np.float32) for i, shape in HEAD.items()}


def config_json(cfg=SMALL):
    """The part of transformers' config.json that weights do not tell."""
    tower = {"hidden_act": "quick_gelu" if cfg.quick_gelu else "gelu"}
    return {
        "vision_config": {**tower, "num_attention_heads": cfg.vision_heads},
        "text_config": {**tower, "num_attention_heads": cfg.text_heads},
    }


def publish(folder, state, cfg=SMALL):
    """Writes a network as transformers publishes it: weights, config.json, vocab.json and merges.txt."""
    tokenizer_files(folder)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json(cfg)))


def converted_clip(folder, seed=0):
    """The folder of a converted network with head and tokenizer, written below another one."""
    publish(folder / "source", random_state(seed=seed))
    save_file(random_head(), folder / "head.safetensors")
    cfg, arrays = store.convert("clip", [str(folder / "source"), str(folder / "head.safetensors")])
    store.save(str(folder / "converted"), "clip", cfg, arrays)
    text = read_tokenizer(folder / "source", cfg.vocab, cfg.text_len)
    (folder / "converted" / "tokenizer.json").write_text(text)
    return folder / "converted"


def torch_clip(state, cfg=SMALL):
    """transformers' network with these tensors."""
    import torch
    from transformers import CLIPModel

    model = CLIPModel(clip_config(cfg)).eval()
    model.load_state_dict({key: torch.from_numpy(np.array(x)) for key, x in state.items()}, strict=True)
    return model
