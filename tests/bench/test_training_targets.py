"""Training for any target: transformers' models, and the options of the command."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dflash_decode.checkpoint import load_checkpoint
from dflash_decode.checkpoint.tokenizer import load_tokenizer
from tests.bench.conftest import MASK
from tests.support.tiny import VOCAB
from tools.training.drafter import Shape, TrainedDrafter
from tools.training.features import LiveTexts
from tools.training.optimise import Recipe
from tools.training.target import DecodedTarget, LlamaTarget, TransformersTarget, load_target
from tools.training.train import arguments, check_shape, layers_of, mask_of

pytestmark = pytest.mark.usefixtures("eager")


def test_a_target_of_transformers_is_the_same(folder, target):
    pytest.importorskip("transformers")
    theirs = load_target(str(folder))
    assert isinstance(theirs, TransformersTarget)
    for name in ("hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocab", "eps", "theta",
                 "max_positions", "eos_id"):
        assert getattr(theirs, name) == getattr(target, name), name
    assert torch.equal(theirs.norm, target.norm) and torch.equal(theirs.head, target.head)
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    for got, want in zip(theirs.forward(ids, (2, 0))[1], target.forward(ids, (0, 2))[1], strict=True):
        assert (got - want).abs().max() < 0.02 * want.abs().max()


def test_a_gguf_file_s_hidden_states_on_a_cpu_are_those_of_decoding(tmp_path):
    pytest.importorskip("gguf")
    from tests.support import gguf_files

    file = str(tmp_path / "tiny.gguf")
    gguf_files.write_gguf(file, ARCH__context_length=512, tensors=gguf_files.quantised({}))
    target = load_target(file)
    plain, exact = (LlamaTarget(load_checkpoint(file, dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert isinstance(target, DecodedTarget) and torch.equal(target.head, plain.head)
    ids = torch.randint(0, gguf_files.VOCAB, (2, 300), generator=torch.Generator().manual_seed(1))
    found = [model.forward(ids, (0,)) for model in (target, plain, exact)]
    final = found[0][0]
    for got, same, want in zip(*((final, *seen) for final, seen in found), strict=True):
        assert got.shape == want.shape and (got - want).norm() < 2 * (same - want).norm() < 0.1 * want.norm()
    assert torch.equal(target.forward(ids[1:, :40])[0], final[1:, :40])
    (tokens, odds), want = target.likely(final[0], 4), torch.softmax(F.linear(final[0].float(), exact.head), -1)
    assert (odds - want.gather(-1, tokens)).abs().max() < 0.02 and (odds.diff(dim=-1) <= 0).all()
    assert (tokens[:, 0] == want.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("family", ["Qwen3", "Mixtral", "LFM2"])
def test_a_target_can_be_of_another_family(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "head_dim": 16}
    make = {"Qwen3": lambda: transformers.Qwen3Config(**sizes),
            "Mixtral": lambda: transformers.MixtralConfig(**sizes, num_local_experts=2),
            "LFM2": lambda: transformers.Lfm2Config(**sizes, layer_types=["conv", "full_attention"] * 2)}[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make()).bfloat16()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.rand_like(weight))
    model.save_pretrained(tmp_path)
    target, ids = load_target(str(tmp_path)), torch.randint(0, 96, (2, 7))
    final, seen = target.forward(ids, (1, 2))
    with torch.no_grad():
        want = model(ids, output_hidden_states=True)
    assert (F.linear(final, target.head) - want.logits).abs().max() < 0.03 * want.logits.abs().max()
    assert all(torch.allclose(got, want.hidden_states[i + 1], atol=0.05) for i, got in zip((1, 2), seen, strict=True))
    assert target.norm.min() >= 1 and (target.norm.max() > 1) == (family != "LFM2")  # whose norm has another name
    shape = Shape.of(target, 1, (1, 2), 4, MASK)
    drafter = TrainedDrafter(shape, target.norm, torch.ones(2 * target.hidden))
    assert drafter(torch.cat(seen, -1), torch.tensor([[3], [4]]), ids[:, 3:4], 4, target.embedding).shape == (2, 1, 3,
                                                                                                             64)


def test_live_features_are_those_that_are_stored(folder, target, written):
    rows, features = written
    live = LiveTexts(target, load_tokenizer(folder), rows, (0, 2), sample=48)
    for name in ("offsets", "starts", "greedy", "prompts", "sources", "target_layer_ids"):
        assert getattr(live, name) == getattr(features, name), name
    assert torch.equal(live.ids, features.ids)
    first = torch.zeros(len(live.ids), dtype=torch.bool)
    first[live.offsets[:-1]] = True
    sizes = (features.states.float() * features.scale)[~first].pow(2).mean(0).sqrt()
    assert torch.allclose(live.scale, sizes, rtol=0.02)
    live.scale, which = features.scale, [3, 9, 30]
    now, kept = live.batch(which), features.batch(which)
    assert torch.equal(now.ids, kept.ids)
    for row, i in enumerate(which):
        inside = slice(features.starts[i], features.length(i))
        assert (now.states[row, :features.length(i)] - kept.states[row, :features.length(i)]).abs().max() < 0.1
        assert (now.likely[row, inside, 0] == kept.likely[row, inside, 0]).float().mean() > 0.8
        assert torch.allclose(now.odds[row, inside], kept.odds[row, inside], atol=0.02)
        assert now.odds[row, :features.starts[i]].eq(0).all() and now.odds[row, features.length(i):].eq(0).all()


def test_a_target_that_a_drafter_cannot_share_is_refused(tmp_path, folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, head_dim=16, max_position_embeddings=64)
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target: the embedding's scale must be 1.0, as a drafter has none; got 8.0"):
        load_target(str(tmp_path))
    biased = load_checkpoint(folder)
    biased.config["attention_bias"] = True
    with pytest.raises(ValueError, match="must be of a Llama without biases .* got model_type llama"):
        LlamaTarget(biased)


def test_a_gguf_s_features_have_its_rope(tmp_path, folder):
    """Whose scaling is in rope_parameters, as those of Llama 3.1 are."""
    pytest.importorskip("transformers")
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    shutil.copytree(folder, tmp_path / "scaled")
    file = tmp_path / "scaled" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in config.items() if name != "rope_theta"} | {
        "rope_parameters": scaled}))
    ours, plain = (LlamaTarget(load_checkpoint(where)) for where in (tmp_path / "scaled", folder))
    theirs, ids = load_target(str(tmp_path / "scaled")), torch.arange(1, 41)[None]
    want = theirs.forward(ids)[0].float()
    assert (ours.forward(ids)[0].float() - want).abs().max() < 0.05 * want.abs().max()
    assert (plain.forward(ids)[0].float() - want).abs().max() > 0.1 * want.abs().max()


def test_options_come_from_a_file_and_the_command_line_goes_before_it(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('model = "a"\nminutes = 7\ntarget-layer-ids = [1, 5]\nanswers = ["x", "y"]\nfeatures = "live"\n'
                    'mask-token = 17\ntemplate = {enable_thinking = false}\n')
    args = arguments(["--config", str(file), "--minutes", "3"])
    assert (args.model, args.minutes, args.target_layer_ids, args.features) == ("a", 3.0, [1, 5], "live")
    assert args.answers == [Path("x"), Path("y")] and arguments([]).minutes == Recipe.minutes
    assert arguments(["--steps", "9"]).minutes is None  # as long as the steps take
    assert args.mask_token == "17"  # as the command line has it
    want = {"enable_thinking": False}
    assert args.template == want == arguments(["--template", json.dumps(want)]).template
    assert (arguments([]).early_share, arguments(["--start", "x"]).early_share) == (Recipe.early_share, 0.0)
    assert arguments(["--start", "x", "--early-share", "0.2"]).early_share == 0.2


@pytest.mark.parametrize("text, said", [
    ("minuts = 7", "option must be one of --help's; got minuts"),
    ('minutes = "long"', "minutes must be of type float; got 'long'"),
    ("layers = [3]", r"layers must be one value; got \[3\]"),
    ("target-layer-ids = 3", "target-layer-ids must be a list; got 3"),
    ('answer-tokens = "many"', "answer-tokens must be between 16 and 3,072; got many"),
    ('template = "x"', "template must be a JSON object; got x"),
    ("answer-tokens = 5000", "answer-tokens must be between 16 and 3,072; got 5000"),
    ("block-size = 1", "--block-size must be at least 2; got 1"),
    ("steps = 0", "--steps must be positive; got 0"),
    ("minutes = -1", r"--minutes must be positive; got -1\.0"),
    ('features = "some"', "features must be one of stored, live; got 'some'")])
def test_a_wrong_file_of_options_is_refused(text, said, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(SystemExit):
        arguments(["--config", str(tmp_path / "recipe.toml")])
    assert re.search(said, capsys.readouterr().err)


def test_a_start_s_draft_vocabulary_is_kept(tmp_path, capsys):
    start = ["--start", str(tmp_path)]
    assert arguments([]).vocabulary == Recipe.vocabulary == arguments(start).vocabulary
    assert arguments([*start, "--vocabulary", "5"]).vocabulary == 5
    (tmp_path / "draft_vocabulary.json").write_text('{"token_ids": [3, 1, 2]}')
    assert arguments(start).vocabulary == 3
    with pytest.raises(SystemExit):
        arguments([*start, "--vocabulary", "5"])
    assert "--vocabulary must be left out with --start, whose 3 tokens are kept; got 5" in capsys.readouterr().err
    (tmp_path / "recipe.toml").write_text("vocabulary = 5")
    with pytest.raises(SystemExit):
        arguments([*start, "--config", str(tmp_path / "recipe.toml")])
    (tmp_path / "draft_vocabulary.json").write_text('{"token_ids": [1, 1]}')
    with pytest.raises(SystemExit):
        arguments(start)
    assert "token_ids must be a list of distinct token ids" in capsys.readouterr().err


def test_a_drafter_that_no_loop_would_read_is_refused(target, tmp_path):
    shape = Shape.of(target, 1, (0, 2), 4, 5)
    check_shape(shape, target, None)
    with pytest.raises(SystemExit, match="the drafter: .*block_size"):
        check_shape(replace(shape, block=2000), target, None)
    config = shape.config(target)
    for changes, named in (({}, None), ({"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "layer_types"),
                           ({"block_size": 3}, "block_size"),
                           ({"dflash_config": config["dflash_config"] | {"mask_token_id": 6}}, "dflash_config")):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        if named is None:
            check_shape(shape, target, tmp_path)
        else:
            said = f"--start must have the shape of the run; .* has another ([a-z_]+, )?{named}$"
            with pytest.raises(SystemExit, match=said):
                check_shape(shape, target, tmp_path)
    with pytest.raises(SystemExit, match="the drafter: .*No such file"):
        check_shape(shape, target, tmp_path / "none")


def test_layers_and_the_mask_are_checked_before_anything_is_made(folder, target):
    assert layers_of(SimpleNamespace(layers=30), None) == [1, 10, 19, 28] and layers_of(target, [2, 0]) == [0, 2]
    with pytest.raises(SystemExit, match="between 0 and 2, the last layer but one; got"):
        layers_of(target, [0, 3])
    tokenizer = load_tokenizer(folder)
    assert mask_of(tokenizer, target, "17") == 17 and mask_of(tokenizer, target, "<x1>") == tokenizer.token_id("<x1>")
    for wrong in ("<none>", str(VOCAB)):
        with pytest.raises(SystemExit, match="--mask-token must be one of the tokenizer's, or an id below 264; got"):
            mask_of(tokenizer, target, wrong)
