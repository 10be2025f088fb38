"""Contrastive: loss, zero-shot and recall against values by hand and open_clip's; pictures; what is refused."""

import math
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from snell_scale.engines.ranks import Ranks
from snell_scale.engines.single import SingleConfig
from snell_scale.interfaces import Batch, InputSpec
from snell_scale.models.open_clip.config import OpenClipConfig
from snell_scale.tasks import retrieval
from snell_scale.tasks.contrastive import Contrastive, ContrastiveConfig
from snell_scale.tasks.pair_pictures import tiles
from snell_scale.tasks.retrieval import pair_loss, recalls
from snell_scale.tasks.zero_shot import ClassPrompts
from tests.tasks.contrastive_parts import TinyClip, bundle_of, pairs, stacked, tokenize
from tests.tasks.parts import data_of, model_of

FIELDS = {"image", "text", "index", "label", "image_id", "caption"}
NAMES = ["one", "two", "three"]


def task_of(samples: list[Batch], *, fields: set[str] = FIELDS, **settings: Any) -> Contrastive:
    data = data_of(class_names=NAMES, fields=fields, samples=samples, size=4)
    return ContrastiveConfig(**settings).build(data=data, model=bundle_of(TinyClip()))


def evaluated(task: Contrastive, model: TinyClip, samples: list[Batch], *, size: int) -> dict[str, float]:
    evaluation = task.evaluation(model, data_of(class_names=NAMES, fields=FIELDS, samples=samples).test)
    for first in range(0, len(samples), size):
        evaluation.add(model, stacked(samples[first : first + size]))
    return evaluation.metrics(evaluation.sums())


def test_the_loss_is_the_cross_entropy_both_ways() -> None:
    samples = pairs(6)
    model = TinyClip()
    found = task_of(samples)(model, stacked(samples))["loss"]
    image, text, scale = model(stacked(samples)["image"], stacked(samples)["text"])
    logits = (scale * image @ text.T).tolist()
    rows = [math.log(sum(math.exp(v) for v in row)) - row[i] for i, row in enumerate(logits)]
    columns = [math.log(sum(math.exp(row[i]) for row in logits)) - logits[i][i] for i in range(6)]
    assert found.item() == pytest.approx(sum(rows + columns) / 12, rel=1e-5)  # float32 against Python floats


def test_the_logit_scale_is_limited_and_trains_at_clips_limit() -> None:
    samples = pairs(6)
    losses, gradients = [], []
    for scale in (100.0, 1000.0, 5000.0):
        model = TinyClip(scale=scale)
        loss = task_of(samples)(model, stacked(samples))["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.logit_scale.grad)
    assert losses[1] == losses[2]
    # the limit is a thousandth above 100, and the loss at most proportional to it
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert gradients[0] is not None
    assert gradients[0] != 0  # exp(ln 100) is above 100 in float32: a limit of 100 would cut it off
    assert gradients[1] == 0


def test_class_features_are_those_of_open_clip() -> None:
    arguments = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 8, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
    config = OpenClipConfig(architecture="custom", arguments=arguments)
    tokens = config.preprocessing().tokenize
    assert tokens is not None
    model = config.build(
        num_classes=3, input_spec=InputSpec(3, 8, 8, (0.5,) * 3, (0.5,) * 3), seed=0
    ).module.eval()
    templates = ("a photo of {}.", "{}", "the word {}")
    found = ClassPrompts(NAMES, templates, tokens).embed(model, torch.device("cpu"))
    expected = open_clip.build_zero_shot_classifier(
        model, tokens, NAMES, [lambda name, text=text: text.format(name) for text in templates]
    )
    assert torch.allclose(found.T, expected, atol=1e-6)  # float32, in batches of other sizes


def test_zero_shot_counts_the_nearest_class() -> None:
    samples = pairs(7)
    model = TinyClip()
    templates = ("a {}", "b {}.")
    metrics = evaluated(task_of(samples, templates=templates), model, samples, size=3)
    nearest = []
    with torch.no_grad():
        image, _, _ = model(stacked(samples)["image"], None)
        for row in image:
            scores = []
            for name in NAMES:
                texts = model(None, tokenize([text.format(name) for text in templates]))[1]
                scores.append(float(row @ normalize(texts.mean(dim=0), dim=0)))
            nearest.append(scores.index(max(scores)))
    right = sum(found == index % 3 for index, found in enumerate(nearest))
    assert 0 < right < 7  # both happen, or a constant would pass
    assert metrics["zero_shot_top1"] == pytest.approx(100 * right / 7)
    assert "zero_shot_top5" not in metrics


def test_top5_of_more_than_five_classes() -> None:
    samples = pairs(8, classes=7)
    data = data_of(class_names=list("abcdefg"), fields=FIELDS, samples=samples, size=4)
    task = ContrastiveConfig().build(data=data, model=bundle_of(TinyClip()))
    metrics = evaluated(task, TinyClip(), samples, size=8)
    assert task.reported[:2] == ("zero_shot_top1", "zero_shot_top5")
    assert metrics["zero_shot_top1"] <= metrics["zero_shot_top5"] < 100


def test_recall_of_several_captions_of_an_image_by_hand() -> None:
    # Two images; the first has captions 0 and 1, the second 2. Caption 1 is nearer to the other image.
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    texts = normalize(torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), dim=1)
    to_text, to_image = recalls(
        images, texts, image_ids=torch.tensor([7, 7, 3]), text_ids=torch.tensor([0, 1, 2]), ks=(1, 2)
    )
    assert to_text == [100.0, 100.0]  # either of its captions answers an image
    assert to_image == [pytest.approx(200 / 3), 100.0]


def test_equal_captions_are_one_candidate_right_for_each_of_their_images() -> None:
    images = torch.eye(3)
    texts = torch.eye(3)[[0, 1, 1]]
    ids = {"image_ids": torch.arange(3), "text_ids": torch.tensor([0, 1, 1])}
    assert recalls(images[[0, 1, 1]], texts, ks=(1,), **ids) == ([100.0], [100.0])


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_model_that_tells_nothing_apart_has_no_recall(value: float) -> None:
    same = torch.full((4, 3), value)
    ids = torch.arange(4)
    assert recalls(same, same, image_ids=ids, text_ids=ids, ks=(1, 3, 4)) == (
        [0.0, 0.0, 100.0],
        [0.0, 0.0, 100.0],
    )


def test_recall_and_loss_in_parts_are_those_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (normalize(torch.randn(23, 4, generator=generator), dim=1) for _ in range(2))
    ids = {"image_ids": torch.arange(23) // 3 * 5, "text_ids": torch.arange(23) % 19}
    whole = recalls(images, texts, ks=(1, 5, 10), **ids), pair_loss(images, texts, torch.tensor(7.0))
    monkeypatch.setattr(retrieval, "_ROWS", 4)
    parts = recalls(images, texts, ks=(1, 5, 10), **ids), pair_loss(images, texts, torch.tensor(7.0))
    assert parts[0] == whole[0] == brute_force(images, texts, **ids, ks=(1, 5, 10))
    logits = 7 * images @ texts.T
    expected = (cross_entropy(logits, torch.arange(23)) + cross_entropy(logits.T, torch.arange(23))) / 2
    # float32 sums in another order
    assert torch.allclose(torch.stack([parts[1], whole[1]]), expected, rtol=1e-5)


def brute_force(
    images: Tensor, texts: Tensor, *, image_ids: Tensor, text_ids: Tensor, ks: tuple[int, ...]
) -> tuple[list[float], list[float]]:
    """Recall by sorting, query by query."""
    sides = (images, image_ids.tolist()), (texts, text_ids.tolist())
    partners = set(zip(image_ids.tolist(), text_ids.tolist(), strict=True))
    found = []
    for (queries, query_ids), (candidates, candidate_ids), flip in (
        (*sides, False),
        (*reversed(sides), True),
    ):
        first = {key: position for position, key in reversed(list(enumerate(candidate_ids)))}
        answers = []
        for query, row in {key: position for position, key in reversed(list(enumerate(query_ids)))}.items():
            near = sorted(first, key=lambda key: float(-queries[row] @ candidates[first[key]]))
            hits = [((key, query) if flip else (query, key)) in partners for key in near]
            answers.append(hits.index(True))
        found.append([100 * sum(answer < k for answer in answers) / len(answers) for k in ks])
    return found[0], found[1]


def test_the_metrics_do_not_depend_on_the_batches() -> None:
    samples = pairs(10)
    task, model = task_of(samples), TinyClip()
    expected = evaluated(task, model, samples, size=10)
    found = evaluated(task, model, samples, size=3)
    assert found == pytest.approx(expected, rel=1e-5)  # float32 products of other shapes
    assert set(task.reported) <= expected.keys()


def test_what_does_not_count_leaves_no_trace() -> None:
    samples = pairs(4)
    task, model = task_of(samples), TinyClip()
    evaluation = task.evaluation(model, data_of(class_names=NAMES, fields=FIELDS, samples=samples).test)
    evaluation.add(model, stacked(samples), counts=False)
    assert not any(value.any() for value in evaluation.sums().values())
    with pytest.raises(ValueError, match="no sample was evaluated"):
        evaluation.metrics(evaluation.sums())


def test_without_labels_retrieval_chooses() -> None:
    samples = [{key: value for key, value in sample.items() if key != "label"} for sample in pairs(4)]
    task = task_of(samples, fields={"image", "text", "index"})
    assert task.metric == "image_to_text_recall1"
    metrics = evaluated(task, TinyClip(), samples, size=4)
    assert not [name for name in (*metrics, *task.reported) if name.startswith("zero_shot")]
    assert task_of(pairs(4), metric="text_to_image_recall5").metric == "text_to_image_recall5"
    with pytest.raises(ValueError, match=r"task.metric=zero_shot_top1 needs data with labels"):
        task_of(samples, fields={"image", "text", "index"}, metric="zero_shot_top1")


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "{name}", "{0} {}"])
def test_a_template_without_one_place_for_the_name_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="expected one {} in it"):
        ContrastiveConfig(templates=(template,))


def test_a_model_that_reads_nothing_is_refused() -> None:
    data = data_of(class_names=NAMES, fields=FIELDS)
    with pytest.raises(ValueError, match="reads text"):
        ContrastiveConfig().build(data=data, model=model_of("image_text_features"))


def test_pictures_frame_right_and_wrong_and_keep_the_pixels() -> None:
    spec = InputSpec(3, 4, 4, (0.5,) * 3, (0.5,) * 3)
    images = torch.stack([torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), 1.0)])
    picture = tiles(
        images,
        ["yes", "a very long caption that fits in no line of this width\nis: b"],
        right=[True, False],
        spec=spec,
    )
    assert picture.dtype == torch.uint8
    colours = [tuple(picture[0, column].tolist()) for column in (0, picture.shape[1] // 2)]
    assert colours == [(46, 125, 50), (198, 40, 40)]
    assert picture[60, 60].tolist() == [0, 0, 0]
    assert picture[60, picture.shape[1] // 2 + 60].tolist() == [255, 255, 255]


@pytest.mark.parametrize("labelled", [True, False])
def test_pictures_of_a_split(labelled: bool) -> None:
    samples = pairs(5)
    fields = FIELDS if labelled else FIELDS - {"label"}
    data = data_of(class_names=NAMES, fields=fields, samples=samples, size=4)
    data = type(data)(**{**vars(data), "captions": tuple(f"caption {number}" for number in range(5))})
    model = TinyClip()
    task = ContrastiveConfig().build(data=data, model=bundle_of(model))
    task.prepare(data, SingleConfig(device="cpu").build(Ranks()))
    (picture,) = task.pictures(model, data.test).values()
    assert (picture.shape[2], picture.dtype) == (3, torch.uint8)
    assert len(picture.unique()) > 50  # frames, noise and words, not an empty sheet
