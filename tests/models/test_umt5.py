"""The text encoder against transformers on a small random model; the tokenizer step."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from convert import umt5
from rfl_jax.data.text import PromptTokenizer, clean
from rfl_jax.errors import UserError
from rfl_jax.models.umt5 import relative_buckets
from tests.golden import relative


def test_agrees_with_transformers_through_the_converter(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.UMT5Config(
        vocab_size=50,
        d_model=24,
        d_kv=10,
        d_ff=40,
        num_layers=3,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    theirs = transformers.UMT5EncoderModel(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ids = np.random.default_rng(0).integers(0, 50, (2, 20))
    mask = (np.arange(20) < np.array([[20], [7]])).astype(np.int64)
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    state = {k: v.numpy().copy() for k, v in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    model = umt5.load(tmp_path)
    assert relative(model(ids, mask), want) < 1e-4
    context = np.asarray(model.context(ids, mask))
    assert not context[1, 7:].any()
    assert relative(context[1, :7], want[1, :7]) < 1e-4


def test_buckets_are_exact_when_near_and_logarithmic_when_far():
    buckets = relative_buckets(200, 32, 128)
    assert list(buckets[0, :8]) == [0, 17, 18, 19, 20, 21, 22, 23]
    assert list(buckets[8:0:-1, 0]) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert buckets[0, 199] == 31
    assert buckets[199, 0] == 15


def test_prompts_are_cleaned_cut_and_padded(tmp_path):
    assert clean("  a &amp;amp; b\n\tc\u00a0 ") == "a & b c"
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids, mask = PromptTokenizer(tmp_path, 4)(["a  b", "a a a a a a"])
    assert ids.tolist() == [[3, 2, 1, 0], [3, 3, 3, 1]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"no": "tokenizer"}))
    with pytest.raises(UserError, match=r"tokenizer\.json: expected a Hugging Face"):
        PromptTokenizer(tmp_path, 4)
