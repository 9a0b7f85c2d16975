"""`examples/train_speech.py` on made tones with a tiny wav2vec 2.0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_speech
from arguments import UsageError
from scipy.io import wavfile
from scripts import run_script
from transformers import Wav2Vec2Config

from hf_lottalora import AutoLottaLoraModelForAudioClassification

Train = Callable[..., dict[str, Any]]
RATE, LENGTH = 8_000, 1_000


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WAV files of 24 low and 24 high tones, some with two channels, and an architecture."""
    folder, random = tmp_path_factory.mktemp("tones"), np.random.default_rng(0)
    for label, pitch in (("low", 200), ("high", 2_000)):
        (folder / "train" / label).mkdir(parents=True)
        for number in range(24):
            phase = 2 * np.pi * pitch * np.arange(LENGTH) / RATE + random.uniform(0, 6)
            samples = (np.sin(phase) * 20_000 + random.normal(0, 500, LENGTH)).astype(np.int16)
            samples = np.stack([samples, samples], axis=1) if number % 2 else samples
            wavfile.write(folder / "train" / label / f"{number}.wav", RATE, samples)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (8, 4), "conv_kernel": (16, 8), "classifier_proj_size": 8}
    convolutions |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    Wav2Vec2Config(**sizes, **convolutions, apply_spec_augment=False).save_pretrained(folder / "wav2vec2")
    return folder


@pytest.fixture
def train(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    def run(*arguments: str, output: str = "out") -> dict[str, Any]:
        common = f"--config_name {tones}/wav2vec2 --cache_dir {tones}/cache --max_length_seconds 0.1 --max_steps 20"
        common += " --do_train --do_eval --learning_rate 1e-2 --logging_steps 1 --validation_split_percentage 25"
        common += f" --train_dir {tones}/train"
        return run_script(train_speech, [*common.split(), *arguments], tmp_path / output, monkeypatch)

    return run


def test_a_run_and_what_it_saves(train: Train) -> None:
    run = train("--save_steps", "10")
    assert (run["train_samples"], run["eval_samples"]) == (36, 12) and run["eval_accuracy"] >= 0.9
    assert np.mean(run["losses"][-3:]) < 0.7 * run["losses"][0]
    again = AutoLottaLoraModelForAudioClassification.from_pretrained(run["folder"])
    again.verify_scaffold(full=True)
    assert again.config.id2label == {0: "high", 1: "low"} and (run["folder"] / "preprocessor_config.json").is_file()
    waves = torch.randn(2, 1_600, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(waves).logits, run["trainer"].model.eval()(waves).logits)

    resumed = train("--resume_from_checkpoint", str(run["folder"] / "checkpoint-10"), output="resumed")
    assert resumed["losses"] == run["losses"]


def test_waves_are_resampled_and_mixed(tones: Path) -> None:
    mono, stereo = (train_speech.wave(f"{tones}/train/low/{n}.wav", 16_000) for n in (0, 1))
    assert mono.shape == stereo.shape == (2 * LENGTH,) and mono.dtype == np.float32
    as_they_are = train_speech.wave({"bytes": (tones / "train/low/0.wav").read_bytes(), "path": "x"}, RATE)
    assert np.array_equal(as_they_are, wavfile.read(tones / "train/low/0.wav")[1])
    spectrum = np.abs(np.fft.rfft(mono))
    assert np.fft.rfftfreq(len(mono), 1 / 16_000)[spectrum.argmax()] == pytest.approx(200, abs=8)


BAD_ARGUMENTS = [
    ("--max_length_seconds 0", r"--max_length_seconds must be positive, got 0.0"),
    ("--train_dir {tmp}/none", r"none: no such folder"),
    ("--train_dir {tones}/train/low", r"low: no WAV file there. A folder for each class expected, such as yes/0.wav"),
    ("--train_dir {tmp}/other", r"a.wav: not a WAV file that SciPy reads"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(train: Train, tones: Path, tmp_path: Path, arguments: str, message: str) -> None:
    for label in ("a", "b"):
        (tmp_path / "other" / label).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "other" / label / f"{number}-a.wav").write_text("no sound")
    with pytest.raises(UsageError, match=message):
        train(*arguments.format(tones=tones, tmp=tmp_path).split())
    assert not list(tmp_path.glob("out/*"))
