"""Loading images: known layouts give known arrays, and errors name damaged files."""

import gzip
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from learned_opt.errors import DataError
from learned_opt.tasks.data import load_images
from learned_opt.tasks.text import load_text
from learned_opt.tasks.workloads.texts import load_corpus

IDX_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def small_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (6, 4, 5), dtype=np.uint8),
        "train_labels": np.array([2, 0, 1, 1, 0, 2], dtype=np.uint8),
        "test_images": rng.integers(0, 256, (3, 4, 5), dtype=np.uint8),
        "test_labels": np.array([1, 2, 0], dtype=np.uint8),
    }


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_idx(root: Path, arrays: dict[str, np.ndarray], folder: str = "MNIST") -> Path:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for key, name in IDX_FILES.items():
        (raw / name).write_bytes(idx_bytes(arrays[key]))
    return raw


def write_npz(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        np.savez(
            folder / f"{split}.npz",
            images=arrays[f"{split}_images"],
            labels=arrays[f"{split}_labels"],
        )


def assert_holds(data, arrays: dict[str, np.ndarray]) -> None:
    pixels = arrays["train_images"].astype(np.float64)
    for split in ("train", "test"):
        images = arrays[f"{split}_images"]
        expected = (images.reshape(len(images), -1) - pixels.mean()) / pixels.std()
        x, y = getattr(data, f"{split}_x"), getattr(data, f"{split}_y")
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        np.testing.assert_allclose(x.numpy(), expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(y.numpy(), arrays[f"{split}_labels"])
    assert data.num_classes == 3
    assert data.image_shape == images.shape[1:]


def test_digits_are_split_and_standardised_by_the_training_set():
    data = load_images("digits")
    assert data.train_x.shape == (1437, 64) and data.test_x.shape == (360, 64)
    assert data.image_shape == (8, 8) and data.num_classes == 10
    assert abs(data.train_x.double().mean()) < 1e-6
    assert abs(data.train_x.double().std(correction=0) - 1) < 1e-6
    # One scalar for all pixels: the grey levels 0 to 16 stay 17 values, equally spaced.
    levels = torch.cat([data.train_x, data.test_x]).unique()
    assert len(levels) == 17
    assert torch.allclose(levels.diff(), levels.diff()[0])
    assert load_images("digits", "/nowhere") is data


def test_digits_split_loses_no_image_and_repeats_none():
    from sklearn.datasets import load_digits

    def rows(x) -> list[tuple[int, ...]]:
        return sorted(map(tuple, x))

    data = load_images("digits")
    x = torch.cat([data.train_x, data.test_x])
    grey = ((x - x.min()) / (x.max() - x.min()) * 16).round().int()
    assert rows(grey.tolist()) == rows(load_digits().data.astype(int).tolist())


@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")],
)
def test_idx_files_are_read_plain_and_gzipped(tmp_path, name, folder):
    arrays = small_arrays()
    raw = write_idx(tmp_path / "plain", arrays, folder)
    assert_holds(load_images(name, tmp_path / "plain"), arrays)
    zipped = tmp_path / "gz" / folder / "raw"
    zipped.mkdir(parents=True)
    for file in raw.iterdir():
        (zipped / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert_holds(load_images(name, tmp_path / "gz"), arrays)


@pytest.mark.parametrize("kept", [0, 2, 9, 16, -1])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_truncated_idx_file_is_named(tmp_path, kept, zipped):
    raw = write_idx(tmp_path, small_arrays())
    file = raw / IDX_FILES["test_images"]
    content = file.read_bytes()
    if zipped:
        file.unlink()
        file = file.with_name(f"{file.name}.gz")
        content = gzip.compress(content)
    file.write_bytes(content[:kept])
    with pytest.raises(DataError, match=f"{file.name} .*get it again"):
        load_images("mnist", tmp_path)


def test_an_idx_file_of_another_kind_is_named(tmp_path):
    raw = write_idx(tmp_path, small_arrays())
    (raw / IDX_FILES["train_images"]).write_bytes(idx_bytes(small_arrays()["train_labels"]))
    with pytest.raises(DataError, match=r"train-images.* begins with 00000801.*00000803"):
        load_images("mnist", tmp_path)


def test_npz_files_are_read_by_name_path_and_environment(tmp_path, monkeypatch):
    arrays = small_arrays() | {"train_labels": np.array([2, 0, 1, 1, 0, 2])}
    write_npz(tmp_path / "mine", arrays)
    assert_holds(load_images("mine", tmp_path), arrays)
    assert_holds(load_images(str(tmp_path / "mine")), arrays)
    monkeypatch.setenv("LEARNED_OPT_DATA", str(tmp_path))
    assert load_images("mine") is load_images("mine", tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_labels": np.array([2, 0, 1, 1, 0])}, r"train\.npz: .*\(6, 4, 5\) and \(5,\)"),
        ({"test_labels": np.array([1, 3, 0])}, "test labels are from 0 to 3.*0 to 2"),
        ({"test_labels": np.array([1, -1, 0])}, "test labels are from -1 to 1"),
        ({"train_labels": np.array([3, 0, 1, 1, 0, 3])}, "3 values from 0 to 3; renumber"),
        ({"train_labels": np.array([2, 1, 1, 1, 1, 2])}, "2 values from 1 to 2; renumber"),
        ({"test_labels": np.zeros(3)}, r"test\.npz: .*uint8 and float64.*labels\.astype\(int\)"),
        (
            {"train_images": np.random.rand(6, 4, 5)},
            r"float64 and .*convert images with \(255 \* images\)\.round\(\)\.astype",
        ),
        ({"train_images": np.full((6, 4, 5), 200.0)}, r"images with images\.round\(\)\.astype"),
        ({"train_images": np.full((6, 4, 5), -2)}, r"int64 and .*which are from -2 to -2, to 0"),
        ({"train_images": np.full((6, 4, 5), "a")}, "convert images to grey levels from 0 to 255"),
        ({"train_images": np.full((6, 4, 5), 1j)}, "convert images to grey levels from 0 to 255"),
        ({"train_images": np.zeros((6, 4, 5))}, r"train\.npz: .*float64 and uint8"),
        ({"train_images": np.full((6, 4, 5), 7, np.uint8)}, "every pixel .* is 7"),
        ({"test_images": np.zeros((3, 5, 4), np.uint8)}, r"\(4, 5\) and test images \(5, 4\)"),
        ({"test_images": np.zeros((0, 4, 5), np.uint8), "test_labels": np.zeros(0, int)}, "n > 0"),
        ({"test_images": np.array([None, {}, 1])}, r"test\.npz is not a complete .npz file"),
    ],
)
def test_unfit_npz_arrays_are_refused(tmp_path, changed, message):
    write_npz(tmp_path / "mine", small_arrays() | changed)
    with pytest.raises(DataError, match=message):
        load_images("mine", tmp_path)


def test_damaged_npz_files_are_named(tmp_path):
    write_npz(tmp_path / "mine", small_arrays())
    file = tmp_path / "mine" / "train.npz"
    whole = file.read_bytes()
    altered = bytearray(whole)
    altered[whole.index(small_arrays()["train_images"].tobytes())] ^= 1
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**15, 4, 5)}
    with (
        zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive,
        archive.open("images.npy", "w") as f,
    ):
        np.lib.format.write_array_header_1_0(f, header)
    for content in (
        (tmp_path / "huge.npz").read_bytes(),
        b"",
        whole[: len(whole) // 2],
        bytes(altered),
        (tmp_path / "array.npy").read_bytes(),
        (tmp_path / "other.npz").read_bytes(),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"train\.npz is not a complete \.npz file"):
            load_images("mine", tmp_path)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_come_last(tmp_path, channels):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(6, 8, 5, channels), dtype=np.uint8)
    arrays = small_arrays() | {"train_images": images, "test_images": images[:3]}
    write_npz(tmp_path / "last", arrays)
    assert load_images("last", tmp_path).image_shape == (8, 5, channels)
    first = {k: v.transpose(0, 3, 1, 2) for k, v in arrays.items() if v.ndim == 4}
    write_npz(tmp_path / "first", arrays | first)
    fix = rf"channels first; .*\(6, 8, 5, {channels}\), with images\.transpose\(0, 2, 3, 1\)"
    with pytest.raises(DataError, match=rf"train\.npz: images are \(6, {channels}, 8, 5\).*{fix}"):
        load_images("first", tmp_path)


def test_a_file_with_the_name_of_another_compression_says_how_to_call_it(tmp_path):
    name = IDX_FILES["train_images"]
    file = write_idx(tmp_path / "plain", small_arrays()) / name
    plain = file.read_bytes()
    file.write_bytes(gzip.compress(plain))
    with pytest.raises(DataError, match=f"{name} is compressed with gzip; rename it to {name}.gz"):
        load_images("mnist", tmp_path / "plain")
    file.rename(f"{file}.gz")
    assert_holds(load_images("mnist", tmp_path / "plain"), small_arrays())
    file = write_idx(tmp_path / "zipped", small_arrays()) / name
    file.rename(f"{file}.gz")
    with pytest.raises(DataError, match=rf"{name}.gz .*Not a gzipped file.*; rename it to {name}$"):
        load_images("mnist", tmp_path / "zipped")


def test_missing_data_says_what_is_expected_where_and_how_to_get_it(tmp_path, monkeypatch):
    raw = write_idx(tmp_path, small_arrays())
    (raw / IDX_FILES["test_labels"]).unlink()
    with pytest.raises(DataError) as caught:
        load_images("mnist", tmp_path)
    assert str(raw / IDX_FILES["test_labels"]) in str(caught.value)
    assert IDX_FILES["train_images"] not in str(caught.value)
    assert f"torchvision.datasets.MNIST(root={str(tmp_path)!r}, download=True)" in str(caught.value)

    with pytest.raises(DataError) as caught:
        load_images("cifar", tmp_path)
    assert str(tmp_path / "cifar" / "train.npz") in str(caught.value)
    assert "numpy.savez" in str(caught.value)

    monkeypatch.delenv("LEARNED_OPT_DATA", raising=False)
    with pytest.raises(DataError, match="pass data_root, or set LEARNED_OPT_DATA"):
        load_images("mnist")


@pytest.mark.parametrize(
    ("name", "file", "train", "test", "shape"),
    [
        ("mnist", "MNIST/raw", 60_000, 10_000, (28, 28)),
        ("cifar10_jpeg", "cifar10_jpeg/train.npz", 20_000, 4_000, (32, 32, 3)),
    ],
)
def test_the_real_sets(name, file, train, test, shape):
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    root = Path(os.environ.get("LEARNED_OPT_DATA") or beside)
    if not (root / file).exists():
        pytest.skip(f"no {root / file}; set LEARNED_OPT_DATA to a folder that holds {file}")
    data = load_images(name, root)
    assert data.image_shape == shape and data.num_classes == 10
    assert data.train_x.shape == (train, np.prod(shape))
    assert data.test_x.shape == (test, np.prod(shape))
    assert abs(data.train_x.mean(dtype=torch.float64)) < 1e-5
    for labels in (data.train_y, data.test_y):
        share = labels.bincount() / len(labels)
        assert len(share) == 10 and share.min() > 0.08 and share.max() < 0.12


def test_text_of_a_file_is_split_and_numbered_by_frequency(tmp_path):
    (tmp_path / "a.txt").write_text("aab " * 45 + "zzzz" * 5)  # the last tenth is new
    text = load_text("a.txt", tmp_path)
    assert text.vocabulary == ("<unk>", "a", " ", "b")
    assert text.train.tolist() == [1, 1, 3, 2] * 45 and text.test.tolist() == [0] * 20
    assert load_text("a.txt", tmp_path) is text
    small = load_text("a.txt", tmp_path, vocabulary=2)
    assert small.vocabulary == ("<unk>", "a") and small.train.tolist() == [1, 1, 0, 0] * 45


def test_text_by_word_keeps_the_frequent_ones(tmp_path):
    (tmp_path / "b.txt").write_text("to be or not to be <unk> to \n be or to be . .\n" * 10)
    text = load_text("b.txt", tmp_path, level="word", vocabulary=4)
    assert text.vocabulary == ("<unk>", "be", "to", ".")  # by alphabet where equally frequent
    assert text.train[:15].tolist() == [2, 1, 0, 0, 2, 1, 0, 2, 1, 0, 2, 1, 3, 3, 2]


def test_markov_text_needs_the_last_two_tokens_and_each_number_is_another_chain():
    text, other = load_text("markov"), load_text("markov-1")
    assert load_text("markov-0").train.equal(text.train) and not other.train.equal(text.train)
    assert len(text.train) > 30_000 and len(text.test) > 3_000
    n = len(text.vocabulary)

    def entropy(order: int) -> float:
        """Empirical, of the next token given the last `order`; nats."""
        context = sum(text.train[i : len(text.train) - order + i] * n**i for i in range(order))
        joint = torch.bincount(context + n**order * text.train[order:], minlength=n ** (order + 1))
        joint = joint.view(n, -1).double() / joint.sum()
        given = (joint / joint.sum(0).clamp(min=1e-12)).clamp(min=1e-12)
        return -float((joint * given.log()).sum())

    assert entropy(2) < 1.6 and 2.1 < entropy(1) < 2.45


def test_a_text_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    for name in ("binary", "absent.txt"):
        with pytest.raises(DataError, match=f"{name}.*'markov'"):
            load_text(name, tmp_path)


@pytest.mark.parametrize("level", ["char", "word"])
def test_a_byte_order_mark_is_no_token(tmp_path, level):
    text = "to be or not to be " * 30
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    (tmp_path / "marked.txt").write_text(text, encoding="utf-8-sig")
    plain, marked = (load_text(f"{name}.txt", tmp_path, level) for name in ("plain", "marked"))
    assert marked.vocabulary == plain.vocabulary
    assert marked.train.equal(plain.train) and marked.test.equal(plain.test)
    plain, marked = (load_corpus(f"{name}.txt", tmp_path, level) for name in ("plain", "marked"))
    assert marked.vocabulary == plain.vocabulary and marked.train.equal(plain.train)


@pytest.mark.parametrize("text", ["", "\ufeff", "a", 10 * "a ", " \n" * 50])
def test_a_text_too_short_to_predict_is_refused(tmp_path, text):
    (tmp_path / "short.txt").write_text(text, encoding="utf-8")
    for load in (load_text, load_corpus):
        with pytest.raises(DataError, match=r"'short\.txt' is too short: its .*20 in all"):
            load("short.txt", tmp_path, level="word")


def test_penn_treebank_characters():
    root = Path(os.environ.get("LEARNED_OPT_DATA", ""))
    if not (root / "ptb/ptb.valid.txt").is_file():
        pytest.skip("needs ptb/ptb.valid.txt in the folder $LEARNED_OPT_DATA")
    text = load_text("ptb/ptb.valid.txt", root)
    assert 40 < len(text.vocabulary) < 60 and len(text.train) > 300_000
    start = "".join(text.vocabulary[i] for i in text.train[:29].tolist())
    assert start == " consumers may want to move t"
