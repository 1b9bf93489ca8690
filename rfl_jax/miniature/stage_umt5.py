"""Pretraining of the miniature's tokenizer and text encoder."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from convert import umt5 as umt5_converter
from rfl_jax.data.text import PromptTokenizer
from rfl_jax.miniature.faces import BACKGROUNDS, EXPRESSIONS, MOTIONS, prompt
from rfl_jax.miniature.fit import fit
from rfl_jax.miniature.world import T5_FILE, TOKENIZER_FILE, save_original
from rfl_jax.models.umt5 import UMT5Config, UMT5Encoder
from rfl_jax.models.wan.config import DIT_PRESETS

CHOICES = (len(BACKGROUNDS), len(MOTIONS), len(EXPRESSIONS))


def train_umt5(out: Path, seed: int, scale: float) -> None:
    """Whole words as tokens; an encoder from whose mean one can read what the prompt says."""
    words = list(itertools.product(*(range(n) for n in CHOICES)))
    prompts = [prompt(w) for w in words]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(prompts, trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"]))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    file = out / TOKENIZER_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))

    cfg = DIT_PRESETS["mini"]
    ids, mask = (jnp.asarray(x) for x in PromptTokenizer(file, cfg.text_len)(prompts))
    targets = jnp.asarray(words)
    size = UMT5Config(tokenizer.get_vocab_size(), cfg.text_dim, 48, 64, num_heads=4, num_layers=2)
    graph, params = nnx.split(UMT5Encoder(size, rngs=nnx.Rngs(seed)))
    readout = [0.1 * jax.random.normal(jax.random.key(seed + i), (cfg.text_dim, n)) for i, n in enumerate(CHOICES)]

    def loss(weights: tuple[nnx.State, list[jax.Array]], key: jax.Array) -> tuple[jax.Array, dict]:
        params, readout = weights
        rows = jax.random.randint(key, (32,), 0, len(words))
        hidden = nnx.merge(graph, params).context(ids[rows], mask[rows])
        mean = hidden.sum(1) / mask[rows].sum(1, keepdims=True)
        log_p = [jax.nn.log_softmax(mean @ r) for r in readout]
        chosen = [jnp.mean(jnp.take_along_axis(p, targets[rows, i : i + 1], 1)) for i, p in enumerate(log_p)]
        value = -jnp.sum(jnp.stack(chosen))
        return value, {"size": jnp.sqrt(jnp.mean(hidden**2))}

    params, _ = fit(
        loss,
        (params, readout),
        steps=int(300 * scale),
        learning_rate=3e-3,
        seed=seed,
        label="umt5",
        folder=out / "checkpoints",
    )
    save_original(
        nnx.merge(graph, params),
        umt5_converter.NAMINGS["original"],
        out / "umt5" / T5_FILE,
        {"_class_name": "T5Encoder"},
    )
