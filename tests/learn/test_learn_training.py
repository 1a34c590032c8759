"""The small parts of distillation: schedule, stopping, losses, optimiser, places, augmentation, memory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from featherweight.core import Interval, Measurement, Silent  # noqa: E402
from featherweight.data import open_data  # noqa: E402
from featherweight.data.dataset import InputSpec  # noqa: E402
from featherweight.errors import BudgetError, DataError  # noqa: E402
from featherweight.learn import augment, losses  # noqa: E402
from featherweight.learn.blocks import Pair  # noqa: E402
from featherweight.learn.keeping import stage_from  # noqa: E402
from featherweight.learn.losses import Projection, Target  # noqa: E402
from featherweight.learn.matching import Matching, Weights, damage, rescaled  # noqa: E402
from featherweight.learn.optimiser import Adam, unit_of  # noqa: E402
from featherweight.learn.result import Point, Stage  # noqa: E402
from featherweight.learn.schedule import Schedule, first_plan  # noqa: E402
from featherweight.learn.stopping import Watch  # noqa: E402
from featherweight.learn.student import Footprint, fit_memory  # noqa: E402
from featherweight.learn.teacher import Lesson, Lessons  # noqa: E402
from featherweight.learn.training import Check, Recipe, Trainer, Work  # noqa: E402
from featherweight.runtime import metrics  # noqa: E402


def test_schedule_warms_up_then_falls_as_a_cosine() -> None:
    plan = Schedule(steps=100, warmup=4)
    rates = [plan.rate(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4]
    assert all(a > b for a, b in itertools.pairwise(rates[5:]))
    # Half way a half cosine is at the middle between its ends.
    assert plan.rate(50) == pytest.approx((1 + 0.01) / 2)


def test_schedule_stretched_has_no_jump_and_ends_at_the_floor() -> None:
    plan = Schedule(steps=100, warmup=0)
    new = plan.stretched(40, 70)
    assert new.rate(40) == pytest.approx(plan.rate(40))
    assert new.done(70) == pytest.approx(1.0)
    assert plan.stretched(40, 10_000).steps == 40 + 120  # at most doubled
    assert Schedule.from_json(json.loads(json.dumps(new.to_json()))) == new


def test_first_plan_fits_time_and_limit() -> None:
    assert first_plan(100.0, 0.5).steps == 200
    assert first_plan(100.0, 0.5, most=30).steps == 30
    assert first_plan(math.inf, 1.0, most=7).steps == 7
    assert first_plan(0.1, 5.0).steps == 1


def test_watch_keeps_the_best_and_counts_from_there() -> None:
    watch = Watch()
    for step, loss in enumerate([3.0, 2.0, math.nan, 2.5]):
        watch = watch.seen(step, loss)
    assert (watch.best, watch.best_step, watch.since) == (2.0, 1, 2)
    assert Watch.from_json(json.loads(json.dumps(watch.to_json()))) == watch
    assert Watch.from_json(json.loads(json.dumps(Watch().to_json()))) == Watch()


def test_a_run_that_is_on_its_way_back_is_not_stalled() -> None:
    """The rate first throws a solved student about; what then falls check by check may still become the best."""

    def after(losses: list[float]) -> bool:
        watch = Watch()
        for step, loss in enumerate(losses):
            watch = watch.seen(step, loss)
        return watch.stalled(4, losses)

    assert not after([0.7, 0.9, 0.8, 0.75])  # fewer than four since the best
    assert not after([0.7, 0.9, 0.85, 0.8, 0.75])
    assert after([0.7, 0.75, 0.8, 0.8, 0.85])
    assert after([0.7, 0.8, 0.8, 0.8, 0.8])
    assert after([0.7, math.nan, math.nan, 0.9, 0.8])


def test_divergence_is_the_sum_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    t = 2.0
    p, q = (np.exp(x / t) / np.exp(x / t).sum() for x in (np.array([2.0, 0.0]), np.array([0.0, 1.0])))
    by_hand = t * t * float((p * np.log(p / q)).sum())
    assert float(losses.divergence(student, teacher, axis=1, temperature=t)) == pytest.approx(by_hand)
    as_probabilities = [torch.softmax(x, 1) for x in (student, teacher)]
    same = losses.divergence(*as_probabilities, axis=1, temperature=t, probabilities=True)
    assert float(same) == pytest.approx(by_hand, rel=1e-6)


def test_losses_are_zero_for_equal_answers_and_one_for_none() -> None:
    x = torch.randn(4, 7)
    assert float(losses.relative(x, x)) == 0
    assert float(losses.relative(torch.zeros_like(x), x)) == pytest.approx(1, rel=1e-5)
    assert float(losses.embedding(3 * x, x)) == pytest.approx(0, abs=1e-6)
    # Other widths: only the relations between samples can be compared.
    assert float(losses.embedding(torch.cat([x, torch.zeros(4, 2)], 1), x)) == pytest.approx(0, abs=1e-6)


def test_masked_positions_do_not_count() -> None:
    target = Target("h", "values", 2, "")
    teacher = torch.randn(2, 3, 4)
    student = teacher.clone()
    student[:, 2] = 100
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    assert float(losses.output_loss(target, student, teacher, temperature=1, mask=mask)) == 0


@pytest.mark.parametrize(
    ("name", "value", "metric", "kind"),
    [
        ("logits", np.random.default_rng(0).normal(size=(2, 10)), "agreement", "logits"),
        ("y", np.random.default_rng(0).normal(size=(2, 10)), "accuracy", "logits"),
        ("y", np.random.default_rng(0).normal(size=(2, 10)), "cosine", "embedding"),
        ("y", np.full((2, 5, 4), 0.25), "agreement", "probabilities"),
        ("boxes", np.random.default_rng(0).normal(size=(2, 3, 8, 8)), "sqnr", "values"),
        ("last_hidden_state", np.random.default_rng(0).normal(size=(2, 5, 8)), "cosine", "embedding"),
    ],
)
def test_the_loss_follows_what_the_output_is(name: str, value: np.ndarray, metric: str, kind: str) -> None:
    (chosen,) = losses.choose({name: value.astype(np.float32)}, metrics.get(metric))
    assert chosen.kind == kind
    assert chosen.why


def test_the_loss_can_be_asked_for_and_refused() -> None:
    outputs = {"y": np.zeros((2, 3), np.float32)}
    assert losses.choose(outputs, metrics.get("cosine"), "mse")[0].kind == "values"
    with pytest.raises(DataError, match="loss must be one of"):
        losses.choose(outputs, metrics.get("cosine"), "hinge")
    with pytest.raises(DataError, match="floats"):
        losses.choose({"y": np.zeros((2, 3), np.int64)}, metrics.get("agreement"))


def test_projection_finds_the_channels_that_are_left() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(2, 6, 5, 5)
    mix = torch.randn(6, 4)
    student = torch.einsum("nchw,cd->ndhw", teacher, mix)
    projection = Projection(1)
    with pytest.raises(DataError, match="solved for"):
        projection(student)
    back = torch.einsum("ndhw,de->nehw", student, torch.randn(4, 6)) + 1
    projection.add(student, back)
    projection.solve(ridge=1e-9)
    assert torch.allclose(projection(student), back, atol=1e-3)


def test_a_projection_asks_for_enough_positions_and_is_that_of_all_of_them() -> None:
    """Twelve channels and an offset: 390 rows. The first batch alone has fewer rows than that has numbers."""
    torch.manual_seed(0)
    teacher, mix = torch.randn(50, 12, 3, 3), torch.randn(12, 5)
    student = torch.randn(50, 12, 3, 3)
    teacher = torch.einsum("nchw,cd->ndhw", student, mix) + torch.randn(50, 5, 3, 3)
    projection, seen = Projection(1), 0
    for one, other in zip(student.split(1), teacher.split(1), strict=True):
        seen += 1
        if projection.add(one, other):
            break
    assert seen == 44  # of nine positions each
    projection.solve(ridge=0)
    x, y = (v[:seen].movedim(1, -1).flatten(0, -2).double().numpy() for v in (student, teacher))
    expected, *_ = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), y, rcond=None)
    np.testing.assert_allclose(projection.weight.numpy(), expected, atol=1e-5)
    with pytest.raises(DataError, match="given features"):
        projection.solve()


def test_maps_of_inner_tensors_are_solved_on_as_many_lessons_as_it_takes() -> None:
    torch.manual_seed(0)
    asked: list[int] = []

    def forward(feeds: dict[str, Any], names: list[str]) -> dict[str, Any]:
        return {n: feeds["x"][:, : {"wide": 4, "narrow": 2}[n]] for n in names}

    def lessons() -> Iterator[Lesson]:
        for i in range(1000):
            asked.append(i)
            x = torch.randn(10, 6)
            yield Lesson({"x": x}, {"a": x[:, :5], "b": x[:, :3]}, None, 10)

    pairs = [Pair("a", "wide", 1), Pair("b", "narrow", 1)]
    matching = Matching(forward, (), pairs, Weights())
    matching.fit(lessons())
    assert len(asked) == 15  # 30 rows for each of four channels and an offset
    assert {n: tuple(w.shape) for n, w in matching.fixed.items()} == {"wide": (5, 5), "narrow": (3, 3)}
    asked.clear()
    matching.fit(lessons(), enough=lambda: len(asked) >= 3)  # the time is over
    assert len(asked) == 3
    assert matching.fixed.keys() == {"wide", "narrow"}
    asked.clear()
    Matching(forward, (), [Pair("a", "same", None)], Weights()).fit(lessons())
    assert asked == []


@pytest.mark.parametrize(("keep", "calls"), [(0, 12), (3 * 16, 9), (1 << 20, 6)])
def test_answers_to_data_that_come_back_are_kept_up_to_a_limit(tmp_path: Path, keep: int, calls: int) -> None:
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32))
    data = open_data(tmp_path / "d.npz", [InputSpec("x", np.dtype(np.float32), ("n", 4))])
    asked = []

    def teacher(feeds: dict[str, Any], names: object) -> dict[str, Any]:
        asked.append(feeds)
        return {"y": torch.from_numpy(feeds["x"]) * 2}

    lessons = Lessons(data, teacher, batch=1, micro=1, seed=0, how=augment.Augment(), labels=False, keep=keep)
    for step in range(12):
        (lesson,) = lessons.step(step)
        assert torch.equal(lesson.answers["y"], lesson.feeds["x"] * 2)
    assert len(asked) == calls


def test_tensors_whose_scales_were_moved_are_told_apart() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(4, 8, 5, 5) * torch.linspace(0.1, 3, 8).reshape(1, -1, 1, 1)
    pair = Pair("t", "s")
    assert not rescaled(pair, teacher + 0.3 * torch.randn_like(teacher), teacher)
    assert not rescaled(pair, 0.5 * teacher, teacher)
    assert rescaled(pair, teacher * torch.tensor([0.25, 4.0] * 4).reshape(1, -1, 1, 1), teacher)
    damage = torch.randn_like(teacher) * torch.tensor([0.1, 3.0] * 4).reshape(1, -1, 1, 1)
    assert not rescaled(pair, teacher + damage, teacher)


def test_damage_is_the_mean_error_relative_to_the_teacher() -> None:
    x = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    own, theirs = {"y": 0.5 * x, "inner": x, "mask": x > 0}, {"y": x, "hidden": 3 * x, "mask": x > 0}
    # (1/2)^2 of the output, (2/3)^2 of the inner tensor; what is no float is left out.
    assert damage(own, theirs, [Pair("hidden", "inner")]) == pytest.approx((1 / 4 + 4 / 9) / 2)
    assert damage({}, {}, []) == 1


def test_adam_takes_the_steps_of_torch() -> None:
    torch.manual_seed(1)
    ours, theirs = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    adam = Adam({"w": ours}, {"w": torch.tensor(1.0)}, decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), eps=0, weight_decay=0.1)
    for _ in range(5):
        gradient = torch.randn(3, 2)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        adam.step(0.01)
        reference.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_steps_are_relative_to_each_channel() -> None:
    weight = torch.tensor([[100.0, 100.0], [1e-6, 1e-6], [1.0, -1.0]])
    unit = unit_of(weight)
    assert unit.shape == (3, 1)
    assert float(unit[0]) == pytest.approx(100.0)
    assert float(unit[1]) == pytest.approx(0.1 * float(weight.square().mean().sqrt()))


def test_memory_is_fitted_by_halving_then_recomputing_then_refused() -> None:
    mark = Footprint(weights=0, sample=1000 << 20, kept=100 << 20, before=0)
    assert fit_memory(mark, 16, None).micro == 16
    assert fit_memory(mark, 16, 6000 << 20).micro == 4
    tight = fit_memory(mark, 16, 700 << 20)
    assert tight.recompute
    assert tight.micro == 4
    with pytest.raises(BudgetError, match="--max-memory is"):
        fit_memory(mark, 16, 50 << 20)


@pytest.mark.parametrize("shape", [(5, 3, 8, 6), (5, 8, 6, 3)])
def test_mixtures_are_of_an_image_and_its_follower(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    others = np.roll(images, -1, axis=0)
    seen = 0.0
    for seed in range(20):
        cut = augment.mixed({"x": images}, augment.Augment(cutmix=True), np.random.default_rng(seed))["x"]
        assert cut.dtype == np.float32
        assert np.all((cut == images) | (cut == others))
        seen += float((cut == others).mean())
        added = augment.mixed({"x": images}, augment.Augment(mixup=True), np.random.default_rng(seed))["x"]
        weight = ((added - others) * (images - others)).sum(axis=(1, 2, 3)) / np.square(images - others).sum((1, 2, 3))
        assert np.all((weight > 0.49) & (weight < 1.01))
        weight = weight.reshape(-1, 1, 1, 1)
        assert np.allclose(added, weight * images + (1 - weight) * others, atol=1e-5)
    assert seen / 20 == pytest.approx(0.25, abs=0.05)  # the share of the follower is drawn from 0..1/2


def test_colors_change_and_mixtures_are_for_unlabelled_image_files(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(4):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 20, 3)).astype(np.uint8)).save(tmp_path / str(i % 2) / f"{i}.png")
    spec = InputSpec("x", np.dtype(np.float32), ("n", 3, 16, 16))
    data = open_data(tmp_path, [spec], preprocess="resize=none,crop=16,mean=0:0:0,std=255:255:255")
    assert str(augment.parse("auto", data)) == "flip,crop,color,mixup,cutmix"
    assert str(augment.parse("auto", data, labels=True)) == "flip,crop,color"
    plain, one, same, other = (
        augment.read(data, (0, 1), augment.Augment(color=color), np.random.default_rng(seed))["x"]
        for color, seed in ((False, 1), (True, 1), (True, 1), (True, 2))
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, plain)
    assert not np.array_equal(one, other)
    assert one.min() >= 0
    assert one.max() <= 1


def test_augmentation_suits_the_data(tmp_path: Path) -> None:
    spec = InputSpec("x", np.dtype(np.float32), ("n", 3, 8, 8))
    images = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=images)
    data = open_data(tmp_path / "a.npz", [spec])
    assert str(augment.parse("auto", data)) == "none"
    how = augment.parse("flip,crop", data)
    drawn = [augment.read(data, (1, 4), how, np.random.default_rng(s))["x"] for s in (3, 3, 4)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert drawn[0].shape == (2, 3, 8, 8)
    flipped = augment.read(data, (0,), augment.Augment(flip=True), np.random.default_rng(0))["x"][0]
    assert any(np.array_equal(flipped, x) for x in (images[0], images[0][:, :, ::-1]))
    with pytest.raises(DataError, match="augment=color is for image files"):
        augment.parse("color", data)
    np.savez(tmp_path / "b.npz", x=np.zeros((4, 5), np.float32))
    table = open_data(tmp_path / "b.npz", [InputSpec("x", np.dtype(np.float32), ("n", 5))])
    with pytest.raises(DataError, match="for images"):
        augment.parse("flip", table)


class Bowl:
    """The square of one number; the check is the same loss. A step's sign alone counts, so a high rate leaps about."""

    def __init__(self, start: float) -> None:
        self.weight = torch.nn.Parameter(torch.tensor([start]))

    def work(self) -> Work:
        return Work(
            {"w": self.weight},
            {"w": torch.ones(1)},
            lambda _step, _done: iter([lambda: self.weight.square().sum()]),
            lambda: Check(float(self.weight.detach().square().sum())),
        )


@pytest.mark.parametrize(("retreats", "rate"), [(0, 1.0), (1, 0.3), (3, 0.027)])
def test_a_rate_that_does_harm_is_lowered_from_the_best_weights(retreats: int, rate: float) -> None:
    bowl = Bowl(0.1)
    work = bowl.work()
    at: list[float] = []

    def losses(step: int, done: float) -> Iterator[Callable[[], Any]]:
        at.append(float(bowl.weight.detach()))
        return work.losses(step, done)

    seen = dataclasses.replace(work, losses=losses)
    recipe = Recipe(1.0, most_steps=48, retreats=retreats)
    ended = Trainer(seen, recipe, seconds=math.inf, keeper=None, progress=Silent()).run()
    assert ended.rate == pytest.approx(rate)
    # The check after two steps is the best; the three before the ninth step say harm.
    assert (at[8] == at[2]) == bool(retreats)


@pytest.mark.parametrize("seconds", [(5.0, 0.1, 0.1), (5.0, 0.2, 0.05), (0.1, 0.05, 0.2)])
def test_the_time_is_used_and_checks_keep_to_the_plan(
    seconds: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds of the first step, which says nothing about the others, of the next 200, and of those after them."""
    clock = [0.0]
    monkeypatch.setattr("featherweight.learn.training.time", SimpleNamespace(monotonic=lambda: clock[0]))
    work = Bowl(0.1).work()

    def losses(step: int, done: float) -> Iterator[Callable[[], Any]]:
        clock[0] += seconds[0 if step == 0 else 1 if step <= 200 else 2]
        return work.losses(step, done)

    recipe = Recipe(1e-3, checks=6, patience=99)
    seen = dataclasses.replace(work, losses=losses)
    ended = Trainer(seen, recipe, seconds=100.0, keeper=None, progress=Silent()).run()
    fits = 201 + (100 - seconds[0] - 200 * seconds[1]) / seconds[2]
    assert 0.9 * fits <= ended.steps <= fits + 1
    assert 5 <= len(ended.curve) <= 10


def test_checks_that_cost_much_do_not_eat_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second a step, a minute a check, five minutes."""
    clock = [0.0]
    monkeypatch.setattr("featherweight.learn.training.time", SimpleNamespace(monotonic=lambda: clock[0]))
    work = Bowl(0.1).work()

    def losses(step: int, done: float) -> Iterator[Callable[[], Any]]:
        clock[0] += 1
        return work.losses(step, done)

    def check() -> Check:
        clock[0] += 60
        return work.check()

    seen = dataclasses.replace(work, losses=losses, check=check)
    ended = Trainer(seen, Recipe(1e-3), seconds=300.0, keeper=None, progress=Silent()).run()
    assert ended.steps >= 50


class Kept:
    """A keeper that remembers the last state, as JSON would."""

    def write(self, state, tensors) -> None:
        self.state = json.loads(json.dumps(state))
        self.tensors = {n: x.clone() for n, x in tensors.items()}


@pytest.mark.parametrize("stop_at", [1, 5, 9])
def test_a_run_resumed_around_a_lowered_rate_ends_where_the_whole_run_ends(stop_at: int) -> None:
    def trainer(bowl: Bowl, keeper: Kept, stop=lambda: False) -> Trainer:
        recipe = Recipe(1.0, ema=0.5, most_steps=48, retreats=3)
        return Trainer(bowl.work(), recipe, seconds=math.inf, keeper=keeper, progress=Silent(), stop=stop)

    whole = Bowl(0.1)
    wanted = trainer(whole, Kept()).run()
    kept, steps = Kept(), itertools.count(1)
    trainer(Bowl(0.1), kept, lambda: next(steps) >= stop_at).run()
    again = Bowl(7.0)
    going_on = trainer(again, kept)
    going_on.resume(kept.state, kept.tensors)
    found = going_on.run()
    assert [p.check for p in found.curve] == [p.check for p in wanted.curve]
    assert torch.equal(again.weight, whole.weight)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_a_run_by_time_that_was_stopped_at_once_has_a_plan_when_it_goes_on(
    stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run has seen no step yet, so it has no pace to plan by."""
    clock = [0.0]
    monkeypatch.setattr("featherweight.learn.training.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def trainer(kept: Kept, stop: Callable[[], bool] = lambda: False) -> Trainer:
        work = Bowl(0.1).work()

        def losses(step: int, done: float) -> Iterator[Callable[[], Any]]:
            clock[0] += 1
            return work.losses(step, done)

        seen = dataclasses.replace(work, losses=losses)
        return Trainer(seen, Recipe(1e-3), seconds=300.0, keeper=kept, progress=Silent(), stop=stop)

    kept, steps = Kept(), itertools.count(1)
    assert trainer(kept, lambda: next(steps) >= stop_at).run().interrupted
    going_on = trainer(kept)
    going_on.resume(kept.state, kept.tensors)
    ended = going_on.run()
    assert 250 <= ended.steps <= 301
    assert ended.planned <= 310
    assert len(ended.curve) > 10


def test_a_finished_stage_comes_back_from_a_checkpoint_as_it_was() -> None:
    measured = Measurement(10, "accuracy", 0.5, 0.1, Interval(0.0, 0.2), 0.3, 40)
    stage = Stage(
        "end", 3.0, 48, 0.4, 0.3, True, "the steps are done", measured,
        (Point(0, 0.1, None, 0.4, None), Point(9, 2.5, 0.5, 0.3, 0.6)),
        rates=(3e-3, 9e-4),
    )  # fmt: skip
    assert stage_from(json.loads(json.dumps(dataclasses.asdict(stage)))) == stage
    older = {k: v for k, v in dataclasses.asdict(stage).items() if k != "rates"}  # of a version without it
    assert stage_from(json.loads(json.dumps(older))) == dataclasses.replace(stage, rates=None)
