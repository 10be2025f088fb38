"""Image-text pairs: hand-made CSV lists, shards and Hugging Face folders; splits by image; what is refused."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from snell_scale.data.captioned.image_text import ImageTextConfig
from snell_scale.data.images import BrokenImage
from snell_scale.interfaces import DataBundle, InputSpec, Preprocessing
from tests.data.pair_files import png, ten_pairs, write_images, write_tar

SPEC = InputSpec(3, 8, 8, (0.5,) * 3, (0.25,) * 3, "bicubic")


def tokenize(texts: Any) -> Tensor:
    return torch.tensor([[len(text), ord(text[0])] for text in texts])


READING = Preprocessing(image=SPEC, tokenize=tokenize)


def csv_config(path: Path, **settings: Any) -> ImageTextConfig:
    fractions = {"validation_fraction": 0.2, "test_fraction": 0.2}
    return ImageTextConfig.model_validate({"format": "csv", "source": str(path), **fractions, **settings})


def samples_of(bundle: DataBundle, name: str) -> list[dict[str, Tensor]]:
    split: Any = getattr(bundle, name)
    return [split[(index, 0)] for index in range(len(split))]


def value_of(sample: dict[str, Tensor]) -> int:
    """Which image of one grey value it is."""
    return round(float((sample["image"].mean() * 0.25 + 0.5) * 25.5))


def test_a_csv_gives_pairs_with_their_caption_and_image(tmp_path: Path) -> None:
    bundle = csv_config(ten_pairs(tmp_path), label_column="kind").build(seed=0, preprocessing=READING)
    assert bundle.fields == {"image", "text", "label", "caption", "index", "image_id"}
    assert dict(bundle.sizes) == {"train": 12, "validation": 4, "test": 4}
    assert bundle.class_names == ("a", "b")
    seen = set()
    for name in bundle.sizes:
        samples = samples_of(bundle, name)
        assert [sample["index"].item() for sample in samples] == list(range(len(samples)))
        for first, second in zip(samples[::2], samples[1::2], strict=True):
            number = value_of(first)
            assert value_of(second) == number
            assert bundle.captions[int(first["caption"])] == f'{number}, the "first"'
            assert bundle.captions[int(second["caption"])] == f"second {number}"
            assert first["label"] == number % 2
            assert first["image_id"] == second["image_id"]
            assert torch.equal(second["text"], tokenize([f"second {number}"])[0])
            assert first["text"].dtype == torch.int64
            seen.add(number)
        assert len({int(sample["image_id"]) for sample in samples}) == len(samples) // 2
    assert seen == set(range(10))


def test_splits_depend_on_the_seed_alone(tmp_path: Path) -> None:
    config = csv_config(ten_pairs(tmp_path))
    chosen = [
        [value_of(sample) for sample in samples_of(config.build(seed=seed, preprocessing=READING), "test")]
        for seed in (0, 0, 1, 2)
    ]
    assert chosen[0] == chosen[1]
    assert len({tuple(values) for values in chosen}) > 1


def test_training_crops_are_a_function_of_seed_index_and_epoch(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 5)
    generator = np.random.default_rng(0)
    for index in range(5):
        Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(
            tmp_path / f"images/{index}.png"
        )
    path = tmp_path / "pairs.tsv"
    path.write_text("filepath\ttitle\n" + "".join(f"images/{i}.png\tan image, {i}\n" for i in range(5)))
    config = csv_config(path, crop_scale=[0.5, 0.9])
    first, again = (config.build(seed=3, preprocessing=READING) for _ in range(2))
    train: Any = first.train
    same: Any = pickle.loads(pickle.dumps(again.train))
    assert torch.equal(train[(0, 4)]["image"], same[(0, 4)]["image"])
    assert not torch.equal(train[(0, 4)]["image"], train[(0, 5)]["image"])
    test: Any = first.test
    assert torch.equal(test[(0, 4)]["image"], test[(0, 5)]["image"])
    state = torch.get_rng_state()
    assert train[(0, 0)]["image"].shape == (3, 8, 8)
    assert torch.equal(torch.get_rng_state(), state)


def test_columns_separator_and_names_can_be_others(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    path = tmp_path / "pairs.txt"
    path.write_text(
        "﻿id;file;words;class\n" + "".join(f"{i};{i}.png;wörter {i};{i % 2}\n" for i in range(3)), "utf-8"
    )
    columns = {"image_column": "file", "caption_column": "words", "label_column": "class", "separator": ";"}
    bundle = csv_config(path, **columns, class_names=["even", "odd"], image_size=16).build(seed=0)
    assert set(bundle.captions) == {"wörter 0", "wörter 1", "wörter 2"}
    assert bundle.fields == {"image", "label", "caption", "index", "image_id"}  # no tokenizer, no text
    assert samples_of(bundle, "train")[0]["image"].shape == (3, 16, 16)
    with pytest.raises(ValueError, match="labels are numbers, 0, 1; set data.class_names"):
        csv_config(path, **columns, image_size=16).build(seed=0)
    with pytest.raises(ValueError, match=r"line 3 has label '1', expected one of the 1 classes"):
        csv_config(path, **columns, class_names=["even"], image_size=16).build(seed=0)


def shards(folder: Path) -> str:
    """Two shards of three samples: caption as text, in JSON, and several in JSON."""
    for shard in range(2):
        files: dict[str, bytes] = {}
        for sample in range(3):
            number = 3 * shard + sample
            files[f"part/{number:04d}.png"] = png(number * 10)
            captions: Any = [f"list {number}", f"other {number}"] if sample == 2 else f"json {number}"
            note = {"caption": captions} if sample else {"width": 8}
            files[f"part/{number:04d}.json"] = json.dumps(note).encode()
            if sample == 0:
                files[f"part/{number:04d}.txt"] = f"text {number}\n".encode()
            files[f"part/{number:04d}.cls"] = str(number % 2).encode()
        write_tar(folder / f"shard-{shard:03d}.tar", files)
    return str(folder / "shard-{000..001}.tar")


def test_shards_give_what_is_in_them(tmp_path: Path) -> None:
    config = ImageTextConfig.model_validate(
        {"format": "webdataset", "source": shards(tmp_path), "validation_fraction": 0.2, "test_fraction": 0.2,
         "class_names": ["even", "odd"]}
    )  # fmt: skip
    bundle = config.build(seed=0, preprocessing=READING)
    found = set()
    for name in bundle.sizes:
        for sample in samples_of(bundle, name):
            number = value_of(sample)
            assert sample["label"] == number % 2
            found.add((number, bundle.captions[int(sample["caption"])]))
    assert found == {
        (0, "text 0"), (1, "json 1"), (2, "list 2"), (2, "other 2"),
        (3, "text 3"), (4, "json 4"), (5, "list 5"), (5, "other 5"),
    }  # fmt: skip
    copy: Any = pickle.loads(pickle.dumps(bundle.train))
    assert torch.equal(copy[(0, 1)]["image"], samples_of_epoch(bundle, 1)["image"])


def samples_of_epoch(bundle: DataBundle, epoch: int) -> dict[str, Tensor]:
    train: Any = bundle.train
    return train[(0, epoch)]


def test_hugging_face_folders_give_their_rows(tmp_path: Path) -> None:
    import datasets

    rows = {
        "image": [Image.new("RGB", (8, 8), (number * 10,) * 3) for number in range(6)],
        "caption": [[f"one of {number}", f"two of {number}"] for number in range(6)],
        "kind": [number % 2 for number in range(6)],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.List(datasets.Value("string")),
            "kind": datasets.ClassLabel(names=["even", "odd"]),
        }
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(str(tmp_path / "table"))
    fractions = {"validation_fraction": 0.2, "test_fraction": 0.2}
    settings = {"format": "hf", "source": str(tmp_path / "table"), "label_column": "kind", **fractions}
    bundle = ImageTextConfig.model_validate(settings).build(seed=0, preprocessing=READING)
    assert bundle.class_names == ("even", "odd")
    for name in bundle.sizes:
        for sample in samples_of(bundle, name):
            number = value_of(sample)
            assert bundle.captions[int(sample["caption"])].endswith(f"of {number}")
            assert sample["label"] == number % 2
    copy: Any = pickle.loads(pickle.dumps(bundle.train))
    assert torch.equal(copy[(0, 1)]["image"], samples_of_epoch(bundle, 1)["image"])
    with pytest.raises(ValueError, match=r"no column 'text'; it has image, caption, kind"):
        ImageTextConfig.model_validate({**settings, "caption_column": "text"}).build(
            seed=0, preprocessing=READING
        )
    with pytest.raises(ValueError, match="'kind' is .*expected images"):
        ImageTextConfig.model_validate({**settings, "image_column": "kind"}).build(seed=0, preprocessing=READING)
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"splits train; name one of them, e.g. .*splits/train"):
        ImageTextConfig.model_validate({**settings, "source": str(tmp_path / "splits")}).build(
            seed=0, preprocessing=READING
        )
    with pytest.raises(ValueError, match="is no data set that datasets' save_to_disk wrote"):
        ImageTextConfig.model_validate({**settings, "source": str(tmp_path)}).build(seed=0, preprocessing=READING)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"filepath,words\nimages/0.png,a\n", "no column 'title'; it has filepath, words"),
        (b"", "no column 'filepath'; it has no row"),
        (b"filepath,title\nimages/0.png,a, b\n", "line 2 has another number of columns"),
        (b"filepath,title\nimages/0.png\n", "line 2 has another number of columns"),
        (b'filepath,title\nimages/0.png,"a\n', "no well-formed CSV"),
        ("filepath,title\nimages/0.png,schön\n".encode("latin-1"), "is not UTF-8 .byte"),
        (b"filepath,title\nimages/0.png,a\nimages/77.png,b\n", "1 of 2 images that are not in .*images/77.png"),
        (b"filepath,title\nimages/0.png, \nimages/1.png,b\nimages/2.png,b\n", "empty: .*pairs.csv line 2"),
        (b"filepath,title\nimages/0.png,a\nimages/1.png,b\n", "has 2 image.s., too few"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = ten_pairs(tmp_path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        csv_config(path).build(seed=0, preprocessing=READING)


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.csv cannot be read"):
        csv_config(tmp_path / "nowhere.csv").build(seed=0, preprocessing=READING)


def test_an_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    ten_pairs(tmp_path)
    for name, numbers in {"train": [0, 1], "validation": [2], "test": [3, 1]}.items():
        lines = "".join(f"images/{number}.png,words\n" for number in numbers)
        (tmp_path / f"{name}.csv").write_text(f"filepath,title\n{lines}")
    config = ImageTextConfig.model_validate(
        {"format": "csv", **{name: str(tmp_path / f"{name}.csv") for name in ("train", "validation", "test")}}
    )
    with pytest.raises(
        ValueError, match=r"1 images are in the train split and in the test split: .*images/1.png"
    ):
        config.build(seed=0, preprocessing=READING)


def test_broken_images_stop_the_run_or_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"images/{i}.png,words {i}" for i in range(10)] + ["images/99.png,absent", "images/9.png, "]
    path = ten_pairs(tmp_path, header="filepath,title", rows=rows)
    (tmp_path / "images/3.png").write_bytes(png(30)[:40])
    with pytest.raises(ValueError, match=r"images/99.png"):
        csv_config(path).build(seed=0, preprocessing=READING)
    bundle = csv_config(path, skip_broken=True).build(seed=0, preprocessing=READING)
    assert sum(bundle.sizes.values()) == 9
    assert sorted(Path(name.split(" ")[0]).name for name in bundle.skipped) == ["3.png", "99.png", "pairs.csv"]
    assert "reading every image once: 11 of 11" in capsys.readouterr().err
    path.write_text("\n".join(["filepath,title", *rows[:10]]))
    whole = csv_config(path).build(seed=0, preprocessing=READING)
    with pytest.raises(BrokenImage, match=r"images/3.png is no image.*data.skip_broken=true"):
        [samples_of(whole, name) for name in whole.sizes]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"words"}, r"s.tar:a.txt has no image beside it"),
        ({"a.png": png(0), "a.txt": b"\xff\xfe"}, r"s.tar:a.txt is not UTF-8"),
        ({"a.png": png(0), "a.json": b"{"}, r"s.tar:a.json is no JSON"),
        ({"a.png": png(0)}, r"captions of the train split are empty: .*s.tar:a.png"),
        ({"a.png": png(0), "b.png": png(0), "a.txt": b"x"}, "holds a.txt twice, or apart"),
        ({"README": b"x"}, "holds no sample"),
    ],
)
def test_a_shard_that_cannot_be_used_is_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    good = {"validation": "v", "test": "t"}
    paths = {
        name: write_tar(tmp_path / f"{stem}.tar", {f"{stem}.png": png(1), f"{stem}.txt": b"x"})
        for name, stem in good.items()
    }
    paths["train"] = write_tar(tmp_path / "s.tar", files)
    settings = {"format": "webdataset", **{name: str(path) for name, path in paths.items()}}
    with pytest.raises(ValueError, match=message):
        ImageTextConfig.model_validate(settings).build(seed=0, preprocessing=READING)
