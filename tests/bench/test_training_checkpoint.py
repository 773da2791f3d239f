"""What a training run writes and starts from, and that its data is not the test data."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from bench import PROMPTS
from dflash_decode.checkpoint import drafter_of, load_checkpoint
from dflash_decode.model.vocabulary import read_vocabulary
from tests.bench.conftest import MASK
from tools.training import checkpoint, optimise, texts
from tools.training.drafter import Shape, TrainedDrafter

SHIPPED = Path(drafter_of("smollm2"))
pytestmark = pytest.mark.usefixtures("eager")


def test_what_a_start_was_trained_on_is_never_held_out(target, written, tmp_path):
    _, features = written
    seen = {"p", "ppp"}
    drafter = TrainedDrafter(Shape.of(target, 1, (0, 2), 4, MASK), target.norm, features.scale)
    training = optimise.Training(drafter, target, features, optimise.Recipe(vocabulary=64), tmp_path, seen)
    assert training.held_out and not seen & {features.prompts[i] for i in training.held_out}
    checkpoint.write(tmp_path / "a", drafter, target, torch.arange(9))
    checkpoint.write_record(tmp_path / "a", training, None)
    checkpoint.write_prompts(tmp_path / "a", ["x", "y"], None)
    assert checkpoint.read_prompts(tmp_path / "a") == checkpoint.read_prompts(tmp_path / "a" / "weights") == {"x", "y"}
    assert checkpoint.read_prompts(tmp_path) == set()
    checkpoint.write_prompts(tmp_path / "b", ["z"], tmp_path / "a")
    checkpoint.write_record(tmp_path / "b", training, tmp_path / "a")
    assert checkpoint.read_prompts(tmp_path / "b") == {"x", "y", "z"}
    assert json.loads((tmp_path / "b" / "training.json").read_text())["start"]["texts"] == len(training.used)


def test_a_checkpoint_keeps_nothing_of_other_weights(target, drafter, tmp_path):
    def names():
        return {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}

    ours = {"config.json", "draft_vocabulary.json"}
    checkpoint.write(tmp_path, drafter, target, torch.arange(9))
    assert names() == {*ours, "model.safetensors"}
    (tmp_path / "candidate_selector").mkdir()
    for other in ("candidate_selector/model.safetensors", "calibration.json", "notes.txt"):
        (tmp_path / other).write_bytes(b"1")
    checkpoint.write(tmp_path, drafter, target, torch.arange(9), shard_mb=0.1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert names() == {*ours, "notes.txt", "model.safetensors.index.json", *index["weight_map"].values()}
    checkpoint.write(tmp_path, drafter, target, torch.arange(9))
    assert names() == {*ours, "notes.txt", "model.safetensors"}


def test_a_start_of_another_shape_is_refused(target, drafter):
    tensors = drafter.tensors()
    with pytest.raises(ValueError, match=r"fc.weight must be \(.*\); got none"):
        drafter.load_tensors({name: tensor for name, tensor in tensors.items() if name != "fc.weight"})
    with pytest.raises(ValueError, match=r"x.weight must be absent; got \(1,\)"):
        drafter.load_tensors(tensors | {"x.weight": torch.ones(1)})


def test_shards_hold_the_same_weights(target, drafter, tmp_path):
    checkpoint.write(tmp_path / "one", drafter, target, torch.arange(9))
    checkpoint.write(tmp_path / "more", drafter, target, torch.arange(9), shard_mb=0.1)
    assert len(list((tmp_path / "more").glob("model-*"))) > 2
    one, more = load_checkpoint(tmp_path / "one").tensors, load_checkpoint(tmp_path / "more").tensors
    assert one.keys() == more.keys() and all(torch.equal(one[n], more[n]) for n in one)


def test_a_checkpoint_starts_a_run_with_its_weights_and_vocabulary(target, written, drafter, tmp_path):
    checkpoint.write(tmp_path, drafter, target, torch.arange(9))
    training = optimise.Training(drafter, target, written[1], optimise.Recipe(), tmp_path, (),
                                 read_vocabulary(tmp_path))
    assert training.vocabulary.ids.tolist() == list(range(9)) and len(training.head) == 9
    again = TrainedDrafter(drafter.shape, target.norm, torch.rand(2 * target.hidden) + 0.5)
    again.load_tensors(load_checkpoint(tmp_path).tensors)
    for name, tensor in again.tensors().items():
        torch.testing.assert_close(tensor, drafter.tensors()[name], rtol=1e-2, atol=0)


def test_a_result_keeps_a_share_of_its_start(target, written, drafter, tmp_path):
    _, features = written
    checkpoint.write(tmp_path / "start", drafter, target, torch.arange(9))
    start = load_checkpoint(tmp_path / "start").tensors
    trained = TrainedDrafter(drafter.shape, target.norm, features.scale, seed=5)
    before = {name: t.clone().float() for name, t in trained.tensors().items()}
    recipe = optimise.Recipe(vocabulary=64, start_share=0.25)
    training = optimise.Training(trained, target, features, recipe, tmp_path)
    training.history = [{"loss": 1.5}]
    training.average(start)
    for name, tensor in trained.tensors().items():
        torch.testing.assert_close(tensor.float(), 0.75 * before[name] + 0.25 * start[name].float(), rtol=2e-2,
                                   atol=1e-3)
    assert training.history[-1]["loss"] == 1.5 and training.history[-1]["acceptance"] >= 1


def _normal(text):
    return " ".join(text.split())


def test_no_evaluation_prompt_was_trained_on():
    packed = (SHIPPED.parent / "training_prompts.json.gz").read_bytes()
    trained = {_normal(p) for p in json.loads(gzip.decompress(packed))}
    assert len(trained) == len(trained - {""}) > 1000
    for name in ("gsm8k", "math500", "humaneval", "mt_bench"):
        for row in texts.read_jsonl(PROMPTS / f"{name}.jsonl"):
            for turn in row["turns"]:
                assert _normal(turn) not in trained, row["id"]
