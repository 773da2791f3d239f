"""A drafter in a GGUF file is the drafter that was written into it."""

import pytest
import torch

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from dflash_decode import Session  # noqa: E402
from dflash_decode.checkpoint import CheckpointError, load_checkpoint  # noqa: E402
from dflash_decode.checkpoint.gguf.drafter import drafter_name  # noqa: E402
from dflash_decode.model.config import LayerMask, read_draft_config  # noqa: E402
from dflash_decode.model.drafter import Drafter  # noqa: E402
from dflash_decode.session import _target  # noqa: E402
from dflash_kernels.testing import same_bits  # noqa: E402
from tests.support import tiny  # noqa: E402
from tests.support.decode_models import VOCAB, make_target  # noqa: E402
from tests.support.drafters import Served, draft_config, random_tensors  # noqa: E402

LAYER = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
         "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
TOP = {"dflash": {"fc": "fc", "hidden_norm": "enc.output_norm", "norm": "output_norm"},
       "dflash-draft": {"fc": "dflash_fc", "hidden_norm": "dflash_hidden_norm", "norm": "output_norm"}}
OWN = {"markov_head.markov_w1.weight": "markov_w1.weight", "markov_head.markov_w2.weight": "markov_w2.weight",
       "lm_head.weight": "output.weight", "d2t": "d2t"}
SLIDES = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6,
          "is_causal": False}
DROP = object()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path_factory.mktemp("cache")))


def file_name(arch, name):
    if name in OWN:
        return OWN[name]
    stem, kind = name.rsplit(".", 1)
    if stem in TOP[arch]:
        return f"{TOP[arch][stem]}.{kind}"
    _, layer, rest = stem.split(".", 2)
    return f"blk.{layer}.{LAYER[rest]}.{kind}"


def write(path, arch, tensors, extra=(), **changes):
    """changes: metadata behind the architecture's name, two underscores for a dot."""
    own = {"target_layers": [3, 1, 4], "block_size": 6} if arch == "dflash" else \
        {"dflash.target_layer_ids": [2, 0, 3], "dflash.block_size": 6, "dflash.mask_token_id": 7,
         "dflash.n_target_features": 192}
    fields = {"block_count": 3, "context_length": 512, "embedding_length": 64, "feed_forward_length": 96,
              "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 16, "vocab_size": VOCAB,
              "attention.value_length": 16, "rope.freq_base": 1e4, "rope.dimension_count": 16,
              "attention.layer_norm_rms_epsilon": 1e-5, "attention.causal": False, **own}
    fields |= {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, arch)
    if arch == "dflash":
        writer.add_uint32("tokenizer.ggml.mask_token_id", 7)
    for key, value in fields.items():
        if value is not DROP:
            {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
             list: writer.add_array}[type(value)](f"{arch}.{key}", value)
    for name, t in tensors.items():
        writer.add_tensor(file_name(arch, name), (t if t.dtype == torch.int64 else t.float()).numpy())
    for name in extra:
        writer.add_tensor(name, torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same_drafts(found, config, tensors):
    _, target = make_target("llama", torch.bfloat16)
    made = (Drafter(found.config, found.tensors, target), Drafter(config, tensors, target))
    got, want = (Served(d, [23, 8]).commit_all().draft([1, 2]) for d in made)
    return all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("arch", TOP)
def test_p48_a_drafter_in_gguf_is_the_same_drafter(tmp_path, arch):
    """llama.cpp numbers target layers by their inputs, its forks by their outputs."""
    config = draft_config(SLIDES)
    tensors = random_tensors(config, torch.bfloat16)
    path = write(tmp_path / "d.gguf", arch, tensors, attention__sliding_window=6,
                 attention__sliding_window_pattern=[True, False, True])
    found = load_checkpoint(path)
    read, want = read_draft_config(found.config), read_draft_config(config)
    assert (read.target_layer_ids, read.masks, read.block_size) == ((2, 0, 3), want.masks, 6)
    assert same_drafts(found, config, tensors)


def test_p48_biases_scales_and_an_own_vocabulary_are_read(tmp_path):
    changes = {"attention_bias": True, "final_logit_softcapping": 3.0, "output_multiplier": 0.25,
               "attention_value_scale": 0.5}
    tensors = random_tensors(draft_config(changes), torch.bfloat16)
    found = load_checkpoint(write(tmp_path / "d.gguf", "dflash", tensors, final_logit_softcapping=3.0, logit_scale=0.25,
                                  attention__value_scale=0.5))
    assert same_drafts(found, draft_config(changes), tensors)


def test_p48_a_pattern_is_a_list_or_a_number_and_a_window_alone_is_every_layers(tmp_path):
    tensors, slides, full = random_tensors(draft_config({}), torch.bfloat16), LayerMask(False, (5, 5)), LayerMask()
    for pattern, masks in ((3, (slides, slides, full)), (0, (slides,) * 3), (DROP, (slides,) * 3), (1, (full,) * 3)):
        path = write(tmp_path / "d.gguf", "dflash", tensors, attention__sliding_window=6,
                     attention__sliding_window_pattern=pattern)
        assert read_draft_config(load_checkpoint(path).config).masks == masks
    causal = write(tmp_path / "d.gguf", "dflash", tensors, attention__causal=True)
    assert read_draft_config(load_checkpoint(causal).config).masks == (LayerMask(True),) * 3
    open_ = write(tmp_path / "d.gguf", "dflash", tensors, attention__causal=DROP, attention__sliding_window=6,
                  attention__sliding_window_pattern=[True, False, True])  # as a config.json that does not say
    windowed = read_draft_config(draft_config({"layer_types": ["sliding_attention", "full_attention",
                                                               "sliding_attention"], "sliding_window": 6,
                                               "use_sliding_window": True}))
    assert read_draft_config(load_checkpoint(open_).config).masks == windowed.masks


@pytest.mark.parametrize(("changes", "match"), [
    ({"target_layers": DROP}, r"dflash.target_layers \(or dflash.dflash.target_layer_ids\) must be a list of layer"),
    ({"attention__sliding_window": 6, "attention__sliding_window_pattern": [True]}, "must be a list of 3 layers"),
    ({"mystery": 5}, "dflash.mystery must be absent, as it is not known; got 5"),
    ({"attention__value_length": 8}, "attention.value_length must be key_length = 16; got 8"),
    ({"vocab_size": DROP}, r"dflash.vocab_size \(or tokenizer.ggml.tokens\) must be there; got nothing"),
])
def test_p48_metadata_that_do_not_make_a_drafter_are_named(tmp_path, changes, match):
    tensors = random_tensors(draft_config({}), torch.bfloat16)
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(write(tmp_path / "d.gguf", "dflash", tensors, **changes))


def test_p48_tensors_that_nothing_claims_are_named(tmp_path):
    tensors = random_tensors(draft_config({}), torch.bfloat16)
    for extra, match in ((["blk.0.attn_gate.weight"], "expected the tensors of a DFlash drafter; got blk.0.attn_gate"),
                         (["dflash_fc.weight"], "fc.weight must be there once; got it again as")):
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(write(tmp_path / "d.gguf", "dflash", tensors, extra))


@pytest.mark.parametrize("from_anchor", [True, False, DROP])
def test_p48_a_markov_head_and_a_draft_vocabulary_are_read(tmp_path, from_anchor):
    """llama.cpp has the head's rank in its tensors alone, and the tokens themselves in d2t."""
    config = draft_config({"markov_rank": 8, "draft_vocab_size": 40} | (
        {} if from_anchor is DROP else {"sample_from_anchor": from_anchor}))
    tensors = random_tensors(config, torch.bfloat16) | {"lm_head.weight": torch.randn(40, 64).bfloat16()}
    kept = torch.randperm(VOCAB)[:40].sort().values
    found = load_checkpoint(write(tmp_path / "d.gguf", "dflash", tensors | {"d2t": kept}, ["conf_proj.bias"],
                                  sample_from_anchor=from_anchor, has_confidence_head=True))
    assert read_draft_config(found.config).from_anchor is (from_anchor is not False)
    assert same_drafts(found, config, tensors | {"d2t": kept - torch.arange(40)})


def test_p48_a_session_takes_one_as_draft_and_not_as_model(tmp_path):
    target, folder = tiny.write_target(tmp_path / "m"), tiny.write_drafter(tmp_path / "d")
    tensors = load_checkpoint(folder).tensors
    path = write(tmp_path / "d.gguf", "dflash", tensors, block_count=2, feed_forward_length=tiny.MLP,
                 attention__key_length=64, attention__value_length=64, rope__dimension_count=64, block_size=4,
                 context_length=tiny.CONTEXT, vocab_size=tiny.VOCAB, target_layers=[1, 3],
                 attention__layer_norm_rms_epsilon=1e-6)
    texts = [Session.load(target, draft, block_size=4).run([[1, 2, 3]], max_tokens=8) for draft in (path, folder)]
    assert texts[0].answers[0].tokens == texts[1].answers[0].tokens
    with pytest.raises(CheckpointError, match="model must be a target model; got a drafter, which belongs in draft"):
        _target(str(path), None, torch.bfloat16, torch.device("cpu"), "model")


def test_dflash2s_tensors_have_their_names_in_gguf_too():
    names = {"blk.3.attn_conv_base": "layers.3.attention_conv.base_kernel",
             "blk.0.ffn_conv_base.weight": "layers.0.mlp_conv.base_kernel",
             "blk.0.attn_conv_proj.weight": "layers.0.attention_conv.kernel_projection.weight",
             "selector_predecessor.weight": "candidate_selector.predecessor_codebook",
             "selector_hidden.weight": "candidate_selector.hidden_projection.weight",
             "blk.1.attn_sinks.weight": "layers.1.self_attn.attention_sink_bias",
             "blk.1.attn_q.bias": "layers.1.self_attn.q_proj.bias", "blk.1.attn_q": None,
             "blk.1.attn_gate.weight": None}
    assert {name: drafter_name(name) for name in names} == names
