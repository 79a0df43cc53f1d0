"""Programs in examples/ that go on from files: stopped and resumed training ends where uninterrupted training does."""

import pathlib

import pytest

from accuracy import assert_exact

pytest.importorskip("torch")
pytest.importorskip("tqdm")
safetensors = pytest.importorskip("safetensors.numpy")

TRAIN_KGE = pathlib.Path(__file__).parents[1] / "examples" / "train_kge.py"


def test_training_goes_on_from_a_checkpoint(python, tmp_path):
    lines = ["a\tr\tb", "b\tr\tc", "c\ts\ta", "c\tr\td", "d\ts\tb"]
    for split, part in {"train": lines, "valid": lines[:1], "test": lines[1:2]}.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(part))
    state, whole, parts = (tmp_path / name for name in ("state.pt", "whole.safetensors", "parts.safetensors"))

    def train(epochs, *more, **options):
        fixed = "--dim", "3", "--batch-size", "4", "--negatives", "4", "--n3", "0.01", "--device", "cpu"
        return python(TRAIN_KGE, tmp_path, *fixed, "--epochs", epochs, *more, **options)

    expected = train("3", "--out", whole)
    assert expected.stdout.count("mrr") == 2
    train("1", "--checkpoint", state)
    assert train("3", "--checkpoint", state, "--out", parts).stdout == expected.stdout
    for name, table in safetensors.load_file(whole).items():
        assert_exact(safetensors.load_file(parts)[name], table)
    other = train("3", "--checkpoint", state, "--algebra", "dihedron", check=False)
    assert other.returncode == 1
    assert other.stderr.splitlines()[-1].endswith("state.pt was made with algebra quaternion, not dihedron")
