"""The order of samples."""

import io

import numpy as np
import pytest
from etils import epath

from rfl_jax.data.cache import PreparedClip
from rfl_jax.data.dataset import make_iterator
from rfl_jax.data.metadata import Clip


def fake_prepared(tmp_path, count):
    prepared = []
    for i in range(count):
        buffer = io.BytesIO()
        np.savez(buffer, y=np.full((2, 3), i, np.float32), pool=np.zeros((1, 2), np.float32))
        file = tmp_path / f"{i}.npz"
        file.write_bytes(buffer.getvalue())
        prepared.append(PreparedClip(Clip(i + 2, tmp_path / "v.mp4", ""), epath.Path(file)))
    return prepared


def test_samples_are_shuffled_by_seed_and_resumable(tmp_path):
    prepared = fake_prepared(tmp_path, 6)

    def order(seed, count):
        iterator = make_iterator(prepared, ["y", "pool"], batch=2, seed=seed, noises=0)
        return [next(iterator)["clip"].tolist() for _ in range(count)]

    first = order(0, 6)
    assert first == order(0, 6)
    assert first != order(1, 6)
    for epoch in (first[:3], first[3:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(6))
    assert first[:3] != first[3:]

    singles = make_iterator(prepared, ["y"], batch=1, seed=0, noises=2)
    assert sorted(int(next(singles)["clip"][0]) for _ in range(6)) == list(range(6))
    iterator = make_iterator(prepared, ["y"], batch=2, seed=0, noises=2)
    for _ in range(4):
        next(iterator)
    state = iterator.get_state()
    again = make_iterator(prepared, ["y"], batch=2, seed=0, noises=2)
    again.set_state(state)
    assert [next(again)["clip"].tolist() for _ in range(2)] == first[4:]


def test_a_group_is_one_clip_with_the_next_noises(tmp_path):
    prepared = fake_prepared(tmp_path, 4)

    def batches(**share):
        iterator = make_iterator(prepared, ["y"], seed=0, noises=6, group=2, **share)
        return [next(iterator) for _ in range(6)]

    found = batches(batch=4)
    assert [x["noise_index"].tolist() for x in found] == [[i, i + 1] * 2 for i in (0, 0, 2, 2, 4, 4)]
    for batch in found:
        assert np.array_equal(batch["clip"][::2], batch["clip"][1::2])
        assert np.array_equal(batch["clip"], batch["y"][:, 0, 0])
    for epoch in (found[:2], found[2:4]):
        assert sorted(np.concatenate([x["clip"] for x in epoch])) == [0, 0, 1, 1, 2, 2, 3, 3]
    # However many processes feed a batch.
    parts = [batches(batch=1, share=(i, 4)) for i in range(4)]
    for i, batch in enumerate(found):
        for name in ("clip", "noise_index"):
            assert batch[name].tolist() == [int(part[i][name][0]) for part in parts]


@pytest.mark.parametrize(("noises", "want"), [(0, [0, 1, 2, 3, 4]), (2, [0, 1, 0, 1, 0]), (1, [0] * 5)])
def test_every_epoch_takes_a_samples_next_noise(tmp_path, noises, want):
    iterator = make_iterator(fake_prepared(tmp_path, 6), ["y"], batch=3, seed=0, noises=noises)
    for index in want:
        for _ in range(2):
            assert next(iterator)["noise_index"].tolist() == [index] * 3
