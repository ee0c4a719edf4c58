"""The example jobs for speech and driving: their data, their errors, and that a few steps learn something."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from paceline.errors import DataError, OptionError
from paceline.job import Job
from paceline.load import load_job

EXAMPLES = Path(__file__).parents[2] / "examples"


def found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


needs_vowels = pytest.mark.skipif(not found("sktime"), reason="pip install --no-deps sktime==1.2.0")
needs_kitti = pytest.mark.skipif(not found("gtsam"), reason="pip install --no-deps gtsam==4.3.0")
needs_simulator = pytest.mark.skipif(
    not (found("gymnasium") and found("Box2D") and found("pygame")),
    reason='pip install "gymnasium[box2d]==1.4.0"',
)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


def load(example: str, size: str = "small", **settings: str) -> Job:
    return load_job(EXAMPLES / example, {"size": size, **settings})


def names_of(job: Job) -> dict[str, Any]:
    """The names in the job's file, to look at or to replace."""
    return job.loss.__globals__  # type: ignore[attr-defined]


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest)
    )


def outputs_of(job: Job, model: torch.nn.Module, batch: Any) -> torch.Tensor:
    if not isinstance(batch, dict):
        return model(batch[0])
    names = model.forward.__code__.co_varnames
    return model(**{name: value for name, value in batch.items() if name in names})


def losses_of(job: Job, steps: int) -> list[float]:
    """Train on one batch for a few steps in this process, with no global state but the seed."""
    torch.manual_seed(0)
    model, data = job.model(), job.data("train")
    apart = max(1, len(data) // job.batch_size)
    batch = (job.collate or default_collate)([data[i * apart] for i in range(min(job.batch_size, len(data)))])
    optimizer = job.optimizer(model.parameters())
    assert job.schedule is not None
    schedule = job.schedule(optimizer, steps)
    losses = []
    for _ in range(steps):
        loss = job.loss(outputs_of(job, model, batch), batch)
        loss = loss[0] / loss[1] if isinstance(loss, tuple) else loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def assert_learns(losses: list[float], share: float) -> None:
    assert all(map(math.isfinite, losses))
    assert losses[-1] < share * losses[0]


@pytest.mark.parametrize("example", ["speech.py", "driving.py"])
def test_unknown_data_is_an_option_error(example: str) -> None:
    with pytest.raises(OptionError, match="option data='poetry'") as caught:
        load(example, data="poetry")
    assert "use one of" in caught.value.next_step
    with pytest.raises(OptionError, match="option size='huge'"):
        load(example, size="huge")


# ---- speech, data=vowels -------------------------------------------------------------------------


@needs_vowels
def test_vowels_come_in_the_official_split() -> None:
    job = load("speech.py", size="full")
    train, test = job.data("train"), job.data("test")
    assert (len(train), len(test)) == (270, 370)
    lengths = [len(sample["frames"]) for sample in train + test]
    assert (min(lengths), max(lengths)) == (7, 29)
    assert {sample["frames"].shape[1] for sample in train + test} == {12}
    speakers = torch.cat([sample["targets"] for sample in train])
    assert torch.bincount(speakers).tolist() == [30] * 9
    speakers = torch.cat([sample["targets"] for sample in test])
    assert torch.bincount(speakers).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]


def test_vowels_without_sktime(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "sktime")
    with pytest.raises(DataError, match="JapaneseVowels") as caught:
        load("speech.py").data("train")
    assert "sktime, which is not installed" in caught.value.cause
    assert "pip install --no-deps sktime==1.2.0" in caught.value.next_step


@needs_vowels
def test_vowels_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    job = load("speech.py")
    monkeypatch.setitem(names_of(job), "VOWELS_SHA256", {"train": "0" * 64, "test": "0" * 64})
    with pytest.raises(DataError, match="not the file that this example knows"):
        job.data("test")


@needs_vowels
def test_small_vowels_learn() -> None:
    assert_learns(losses_of(load("speech.py"), 15), share=0.8)


# ---- speech: padding -----------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["vowels", "fillets"])
def test_padding_changes_no_output(data: str) -> None:
    job = load("speech.py", data=data)
    torch.manual_seed(0)
    model = job.model().eval()
    channels = 12 if data == "vowels" else 40
    samples = [{"frames": torch.randn(n, channels), "targets": torch.tensor([1])} for n in (9, 27, 14, 11)]
    assert job.collate is not None
    together = job.collate(samples)
    assert together["frames"].shape == (4, 27, channels)
    assert together["lengths"].tolist() == [9, 27, 14, 11]
    outputs = model(together["frames"], together["lengths"])
    for i, sample in enumerate(samples):
        alone = job.collate([sample])
        expected = model(alone["frames"], alone["lengths"])[0]
        mine = outputs[i] if data == "vowels" else outputs[i, : len(expected)]
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    # What stands in the padding does not matter either.
    together["frames"][0, 9:] = 1e3
    torch.testing.assert_close(model(together["frames"], together["lengths"]), outputs)


# ---- speech, data=fillets ------------------------------------------------------------------------


def fillets_or_skip(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Job:
    monkeypatch.setenv("PACELINE_CACHE", str(cache))
    job = load("speech.py", data="fillets")
    try:
        names_of(job)["fillets_files"]()
    except DataError as error:
        pytest.skip(f"{error.what}: {error.next_step}")
    if not found("soundfile"):
        pytest.skip("pip install soundfile")
    return job


@pytest.mark.parametrize(
    ("subtitle", "words"),
    [
        ("Co je to za divnou loď?", "co je to za divnou loď"),
        ("Aspoň – v 'téhle'... MÍSTNOSTI!", "aspoň v téhle místnosti"),
        ("C\N{COMBINING CARON}istý", "čistý"),
        ("Konkrétně %1 hodin!", None),
        ("Подожди, semafor", None),
        ("...", None),
    ],
)
def test_subtitles_become_letters(subtitle: str, words: str | None) -> None:
    assert names_of(load("speech.py", data="fillets"))["spoken"](subtitle) == words


def test_edit_distance_and_decoding() -> None:
    names = names_of(load("speech.py", data="fillets"))
    distance = names["edit_distance"]
    assert [
        distance("kitten", "sitting"),
        distance("", "abc"),
        distance("abc", ""),
        distance("ryba", "ryba"),
    ] == [
        3,
        3,
        3,
        0,
    ]
    letters = names["LETTERS"]
    a, n, o = (letters.index(x) + 1 for x in "ano")
    assert names["decode"]([0, a, a, 0, n, 0, n, o, o, 0]) == "anno"
    assert names["decode"]([0, 0]) == ""
    batch = {
        "lengths": torch.tensor([8, 4]),  # two frames and one after shrinking
        "targets": torch.tensor([[a, n, o], [o, 0, 0]]),
        "target_lengths": torch.tensor([3, 1]),
    }
    outputs = torch.nn.functional.one_hot(torch.tensor([[a, o], [n, n]]), len(letters) + 1).float()
    assert names["transcripts"](outputs, batch) == [("ano", "ao"), ("o", "n")]
    errors, characters = names["character_errors"](outputs, batch)
    assert (float(errors), float(characters)) == (2.0, 4.0)


def test_mel_filters_cover_the_spectrum() -> None:
    names = names_of(load("speech.py", data="fillets"))
    filters = names["mel_filters"]()
    assert filters.shape == (257, 40)
    assert bool((filters >= 0).all())
    assert bool((filters[2:-2].sum(1) > 0).all())
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(22050) / 22050)
    loudest = (
        torch.stft(tone, 512, 220, window=torch.hann_window(512), return_complex=True).abs().mean(1) @ filters
    ).argmax()
    edges = 700 * (10 ** (torch.linspace(0, 2595 * math.log10(1 + 11025 / 700), 42) / 2595) - 1)
    assert edges[loudest] < 1000 < edges[loudest + 2]


def test_fillets_without_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PACELINE_DATA", str(tmp_path))
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    if Path("/usr/share/games/fillets-ng/script").is_dir():
        pytest.skip("fillets-ng-data is installed on this machine")
    with pytest.raises(DataError, match="fillets-ng cannot be found") as caught:
        load("speech.py", data="fillets").data("train")
    assert "apt-get download fillets-ng-data fillets-ng-data-cs" in caught.value.next_step
    assert "PACELINE_DATA" in caught.value.next_step


def test_fillets_learn_and_share_no_text(monkeypatch: pytest.MonkeyPatch, recordings: Path) -> None:
    job = fillets_or_skip(monkeypatch, recordings)
    names = names_of(job)
    texts = [words for text, _ in names["fillets_files"]()[0] if (words := names["spoken"](text))]
    assert len(texts) > 1600
    assert 0.07 < sum(map(names["held_out"], texts)) / len(texts) < 0.13
    train, test = job.data("train"), job.data("test")
    assert len(train) + len(test) == 48
    assert len(test) > 0
    said = [{tuple(sample["targets"].tolist()) for sample in split} for split in (train, test)]
    assert not said[0] & said[1]
    assert_learns(losses_of(job, 12), share=0.8)
    assert job.showcase is not None
    torch.manual_seed(0)
    shown = job.showcase(job.model().eval())
    assert 0.5 < float(shown["cer_fixed_text"]) <= 1
    assert "heard:" in str(shown["transcripts"])


# ---- driving, data=carracing ---------------------------------------------------------------------


def test_tracks_are_disjoint() -> None:
    for size in ("small", "full"):
        names = names_of(load("driving.py", size=size))
        sets = [set(names[name]) for name in ("TRAIN_TRACKS", "TEST_TRACKS", "DRIVEN_TRACKS")]
        assert len(set.union(*sets)) == sum(map(len, sets))
    assert len(sets[2]) == 5


def test_driving_without_the_simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "Box2D", None)
    with pytest.raises(DataError, match="CarRacing-v3 cannot be loaded") as caught:
        load("driving.py").data("test")
    assert 'pip install "gymnasium[box2d]==1.4.0"' in caught.value.next_step


@needs_simulator
def test_the_scripted_driver_stays_on_the_road() -> None:
    names = names_of(load("driving.py"))
    simulator = names["Simulator"](7)
    driver = names["ScriptedDriver"](simulator)
    for _ in range(500):
        simulator.step(driver.decide())
        aside = np.hypot(*(driver.tiles[driver.nearest] - np.array(simulator.world.car.hull.position)))
        assert aside < names["ROAD_HALF_WIDTH"]
    assert simulator.world.tile_visited_count > 100


@needs_simulator
def test_small_driving_learns_and_drives(monkeypatch: pytest.MonkeyPatch, recordings: Path) -> None:
    monkeypatch.setenv("PACELINE_CACHE", str(recordings))
    job = load("driving.py")
    train, test = job.data("train"), job.data("test")
    assert (len(train), len(test)) == (400, 100)  # two laps of 100 frames, each seen mirrored too
    sample, mirrored = train[150], train[350]
    assert torch.equal(mirrored["frames"], sample["frames"].flip(-1))
    assert torch.equal(mirrored["actions"], sample["actions"] * torch.tensor([-1.0, 1, 1]))
    assert sample["frames"].shape == (1, 42, 48)
    assert sample["frames"].dtype == torch.uint8
    assert sample["frames"].float().std() > 10  # road and grass, not one colour
    assert sample["actions"].shape == (3,)
    again = job.data("train")  # from the cache this time
    assert torch.equal(again.columns["frames"], train.columns["frames"])
    assert_learns(losses_of(job, 25), share=0.7)
    assert job.showcase is not None
    shown = job.showcase(job.model().eval())
    assert shown["return_share"] == float(shown["return_mean"]) / float(shown["return_scripted_mean"])
    assert float(shown["return_scripted_mean"]) > 100


@needs_simulator
def test_recordings_are_the_same_every_time() -> None:
    names = names_of(load("driving.py"))
    names["LAP_STEPS"] = 40
    first, second = names["record"](5), names["record"](5)
    assert all(np.array_equal(first[name], second[name]) for name in ("frames", "speeds", "actions"))


def test_a_lap_that_another_process_records_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import filelock

    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    names = names_of(load("driving.py"))
    (tmp_path / "driving").mkdir()
    with filelock.FileLock(tmp_path / "driving/lap.npz.lock"):
        assert names["cached"]("lap", lambda: {"frames": np.zeros(1)}, 0.0) is None
    assert names["cached"]("lap", lambda: {"frames": np.zeros(1)}, 0.0) is not None
    assert names["cached"]("lap", lambda: pytest.fail("built twice"), 0.0) is not None
    assert not [
        path for path in (tmp_path / "driving").iterdir() if path.name not in ("lap.npz", "lap.npz.lock")
    ]


# ---- driving, data=kitti -------------------------------------------------------------------------


def test_kitti_windows_stay_within_their_split() -> None:
    names = names_of(load("driving.py", data="kitti"))
    rows, border = 46967, int(46967 * 0.7)
    past, ahead = names["BINS"][-1], names["AHEAD"]
    train, test = names["windows"](rows, "train"), names["windows"](rows, "test")
    assert train.min() - past + 1 >= 0
    assert train.max() + ahead < border
    assert test.min() - past + 1 >= border
    assert test.max() + ahead < rows


def test_kitti_without_gtsam(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide(monkeypatch, "gtsam")
    monkeypatch.setenv("PACELINE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"KittiEquivBiasedImu\.txt cannot be found") as caught:
        load("driving.py", data="kitti").data("train")
    assert "pip download --no-deps gtsam==4.3.0" in caught.value.next_step
    assert "PACELINE_DATA" in caught.value.next_step


@needs_kitti
def test_kitti_rows_and_windows() -> None:
    job = load("driving.py", size="full", data="kitti")
    names = names_of(job)
    rows = names["motion"]()
    assert rows.shape == (46967, 6)
    assert rows[:, 2].mean() == pytest.approx(9.79, abs=0.02)  # gravity
    window, target, now = job.data("test").tensors
    first = int(names["windows"](len(rows), "test")[0])
    assert float(now[0]) == pytest.approx(rows[first, 5])
    assert float(target[0]) == pytest.approx(rows[first + 100, 5])
    seen = rows[: int(len(rows) * 0.7)]
    assert float(window[0, 0, 5]) == pytest.approx(
        rows[first - 9 : first + 1, 5].mean() / seen[:, 5].std(), abs=1e-5
    )
    assert float(window[0, -1, 0]) == pytest.approx(
        (rows[first - 99 : first - 89, 0].mean() - seen[:, 0].mean()) / seen[:, 0].std(), abs=1e-5
    )


def test_kitti_mirrored_is_opposite() -> None:
    job = load("driving.py", data="kitti")
    model = job.model().eval()
    window = torch.randn(5, 10, 6)
    mirrored = window * names_of(job)["MIRROR"]
    torch.testing.assert_close(model(mirrored), -model(window))


@needs_kitti
def test_small_kitti_learns_and_compares() -> None:
    job = load("driving.py", data="kitti")
    assert_learns(losses_of(job, 20), share=0.8)
    assert job.showcase is not None
    shown = job.showcase(job.model().eval())
    assert set(shown) == {"rmse_network", "rmse_persistence", "rmse_ridge"}
    full = load("driving.py", size="full", data="kitti")
    assert full.showcase is not None
    shown = full.showcase(full.model().eval())
    assert shown["rmse_persistence"] == pytest.approx(0.145, abs=0.001)
    assert shown["rmse_ridge"] == pytest.approx(0.0914, abs=0.0005)
