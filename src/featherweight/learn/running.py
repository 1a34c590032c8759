"""One distillation run: everything that can be refused is refused first, then the stages, then the proof."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir
import torch

from featherweight.core import Note, Progress
from featherweight.errors import DataError, ModelError
from featherweight.graph import cost, io, surgery
from featherweight.graph.channels.sizes import concrete
from featherweight.learn import augment, blocks, layerwise, losses, students
from featherweight.learn.blocks import Pair
from featherweight.learn.checkpoints import Checkpoints, Saved, fingerprint
from featherweight.learn.distill import STAGES, TEMPERATURE, Asked
from featherweight.learn.keeping import StageKeeper, stage_from
from featherweight.learn.matching import Checker, Matching, Weights, damage, rescaled, steps_of
from featherweight.learn.proof import Proof
from featherweight.learn.reading import read_parts
from featherweight.learn.result import Block, Distilled, Stage
from featherweight.learn.student import COPIES, Footprint, Student, fit_memory, resident_bytes, saved_bytes
from featherweight.learn.teacher import KEPT_BYTES, Lessons, Teacher, as_tensors
from featherweight.learn.training import Outcome, Recipe, Trainer, Work
from featherweight.quantities import format_bytes
from featherweight.search.problem import input_specs

#: Share of the time that goes to the blocks where both stages are asked for.
LAYERS_TIME = 0.7
#: Highest learning rates relative to the size of each weight, and the weight of inner tensors.
RATE_END, FEATURES = 5e-3, 8.0
#: Relative error of inner tensors and outputs from which the whole rate is taken; the least share of it.
DAMAGED, LEAST_RATE = 0.25, 0.1
#: How often a rate that was not asked for may be lowered.
RETREATS = 3
#: Samples whose inner tensors say whether both networks mean the same by them; one would fit any scales.
PROBE = 8
#: Of the second stage's time, for solving the maps between features of different widths.
MAPS_SHARE = 0.1
#: Of the time budget, for measuring at the end; at least this many seconds.
PROOF_SHARE, PROOF_S = 0.04, 5.0


class Run:
    """A run folder, its data and models, and where it stands. A context manager; `work` goes at a good end."""

    def __init__(self, asked: Asked, data: Any, out: Path, progress: Progress) -> None:
        self.asked, self.out, self.progress = asked, out, progress
        self.work = out / "work"
        self._data = data
        self._started = time.monotonic()
        self._before = 0.0
        self._stopped = False
        self.notes: list[Note] = []
        self._threads = asked.threads or os.cpu_count() or 1

    def __enter__(self) -> Self:
        """Ctrl-C ends the run after the step at hand; a second one at once."""
        self._handler: Any = None
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupted)
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Give the signal and torch's threads back; a run refused before its first checkpoint leaves nothing."""
        torch.set_num_threads(self._torch_threads)
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if kind is not None and not (self.work / "checkpoints").exists():
            shutil.rmtree(self.work, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.out.rmdir()

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        if self._stopped:
            raise KeyboardInterrupt
        self._stopped = True

    def elapsed(self) -> float:
        """Seconds of this run so far, pauses between resumed parts not counted."""
        return self._before + time.monotonic() - self._started

    def whole(self, *, resume: bool) -> Distilled:
        """Open, train, measure, write."""
        self._open()
        saved = self.checkpoints.read() if resume else None
        with Proof(self.teacher_path, self.student_path, self._holdout, self.asked, self.work, self._threads) as proof:
            self.progress.start("measuring both models on data kept aside")
            proof.before()
            self.metric = proof.metric
            self._prepare(saved)
            stages = self._stages(saved, proof)
            return self._finish(proof, stages)

    def _open(self) -> None:
        """Models and data; refuses what does not fit together."""
        asked = self.asked
        self.progress.start("reading models and data")
        self.work.mkdir(parents=True, exist_ok=True)
        self.teacher_path = asked.teacher
        made = students.make_student(
            asked.teacher, asked.student, self.work / "student.onnx", trust=asked.trust, seed=asked.seed
        )
        self.student_path, self._named = made.path, made.pairs
        self.notes += made.notes
        self.teacher, self.student_model = io.load(asked.teacher), io.load(self.student_path)
        for model in (self.teacher, self.student_model):
            surgery.sort(model)
        specs = students.shared_inputs(input_specs(self.teacher), input_specs(self.student_model))
        self._open_rows = {s.name for s in specs if s.rows is None}
        parts, notes = read_parts(asked, self._data, specs, self.work, self.progress)
        self.notes += notes
        self._train, self._validation, self._holdout = parts.calibration, parts.validation, parts.holdout
        self._how = augment.parse(asked.augment, self._train, labels=asked.labels)
        if asked.labels and self._how.mixes:
            raise DataError("mixtures of images have no labels; leave out --labels, or mixup and cutmix")
        identity = asked.identity() | {
            "teacher": io.sha256(asked.teacher), "student": io.sha256(self.student_path), "data": self._train.source,
            "data kept aside": fingerprint(self._holdout),
        }  # fmt: skip
        self.checkpoints = Checkpoints(self.work / "checkpoints", identity)

    def _prepare(self, saved: Saved | None) -> None:
        """Executor, losses, memory; where the run stood."""
        asked = self.asked
        torch.manual_seed(asked.seed)
        frozen = [pattern.strip() for pattern in asked.freeze.split(",") if pattern.strip()]
        scales = "none" if asked.rounding == "learned" else asked.train_scales  # moves are on the grid as it is
        self.student = Student(self.student_model, train_scales=scales, freeze=frozen)
        if not self.student.parameters():
            raise ModelError(f"{self.student_path} has no weight that can be trained; give another student")
        self.notes += self.student.executor.fenced
        units = self._train.units()
        several = PROBE if self._train.origin.stackable and not self._train.fixed else 1
        group = [atom for unit in units[:several] for atom in unit]
        first = augment.read(self._train, group, augment.Augment(), np.random.default_rng(0))
        shapes = {
            n: tuple(2 if i == 0 and n in self._open_rows else d for i, d in enumerate(x.shape))
            for n, x in first.items()
        }
        sizes = concrete(self.teacher, shapes), concrete(self.student_model, shapes)
        self._pairs = blocks.pairs(self.student_model, sizes, self._named)
        teacher = Teacher(self.teacher, [p.teacher for p in self._pairs], self.work, threads=self._threads)
        self._ask = teacher
        found = teacher(first)
        with torch.no_grad():
            own = self.student.forward(as_tensors(first), [p.student for p in self._pairs])
        moved = [p for p in self._pairs if rescaled(p, own[p.student], found[p.teacher])]
        if moved:
            text = f"{len(moved)} inner tensors are scaled otherwise than the teacher's and are not matched: "
            self.notes.append(Note("matching", text + ", ".join(p.student for p in moved[:4])))
            self._pairs = [p for p in self._pairs if p not in moved]
        answers = {v.name or "": found[v.name or ""].numpy() for v in self.teacher.graph.outputs}
        self._targets = losses.choose(answers, self.metric, asked.loss)
        if asked.labels and not any(t.kind in ("logits", "probabilities") for t in self._targets):
            raise DataError(
                "--labels needs an output of class scores, but the losses are of "
                f"{', '.join(f'{t.name} ({t.kind})' for t in self._targets)}; leave it out, or give --loss kl"
            )
        equal = [p for p in self._pairs if p.axis is None]
        self._rate = asked.rate or RATE_END * min(max(damage(own, found, equal) / DAMAGED, LEAST_RATE), 1.0)
        temperature = (1.0 if asked.labels else TEMPERATURE) if asked.temperature is None else asked.temperature
        features = FEATURES if asked.features is None else asked.features
        self._weights = Weights(features=features, temperature=temperature)
        alike = blocks.same_places(self.teacher, self.student_model)
        self._wanted = asked.stages or (STAGES if alike or self.student.executor.grids() else STAGES[1:])
        self._matching = Matching(self.student.forward, self._targets, equal or self._pairs, self._weights)
        self.progress.start("seeing how the student does now")
        self._check = Checker(self.student.forward, self._targets, self._validation, teacher, self.metric, temperature)
        self._fit_memory()
        self._units = self.student.units()  # of the weights as they were given, so that a resumed run has the same
        if saved is not None:
            self._restore(saved)

    def _fit_memory(self) -> None:
        """How many samples at a time, from what one sample takes."""
        asked = self.asked
        one = self._lessons(batch=1, micro=1)
        lesson = next(iter(one.step(0)))
        self._matching.fit([lesson])  # for now: the maps that are trained with are solved on many
        stored = sum(p.nbytes for p in self.student.parameters().values())
        each = max(saved_bytes(lambda: self._matching(lesson)) - stored, 0) // max(lesson.n, 1)
        ends = sum(lesson.answers[p.teacher].nbytes for p in self._pairs) // max(lesson.n, 1)
        largest = each // max(len(self._pairs) // 2, 1)
        footprint = Footprint(
            (COPIES + (asked.ema > 0)) * stored, each + 2 * ends, 2 * ends + 2 * largest, resident_bytes()
        )
        self._memory = fit_memory(footprint, asked.batch_size, asked.max_memory)
        self._footprint = footprint
        if self._memory.micro < asked.batch_size or self._memory.recompute:
            again = ", inner values computed again in the backward pass" if self._memory.recompute else ""
            self.notes.append(
                Note("memory", f"{self._memory.micro} of {asked.batch_size} samples of a step at a time{again}: "
                     f"{format_bytes(self._memory.predicted)} predicted at most")
            )  # fmt: skip

    def _lessons(self, *, batch: int = 0, micro: int = 0, names: Sequence[str] | None = None, keep: int = 0) -> Lessons:
        asked = self.asked
        return Lessons(
            self._train, self._ask, batch=batch or asked.batch_size, micro=micro or self._memory.micro,
            seed=asked.seed, how=self._how, labels=asked.labels, names=names, keep=keep,
        )  # fmt: skip

    def _restore(self, saved: Saved) -> None:
        """Take the student's weights and the clock from a checkpoint."""
        self._before = float(saved.state["elapsed"])
        self._started = time.monotonic()
        with torch.no_grad():
            for name, p in self.student.parameters().items():
                own = f"student/{name}"
                p.copy_(saved.tensors[own if own in saved.tensors else f"now/{name}"])

    def _keeper(self, stage: str, block: int, done: Sequence[Stage]) -> Any:
        return StageKeeper(self, stage, block, done)

    def _stages(self, saved: Saved | None, proof: Proof) -> list[Stage]:
        """Train what was asked for; a stage that leaves the answers further from the teacher's is taken back."""
        limit = self._train_until()
        done: list[Stage] = []
        if saved is not None:
            done = [stage_from(raw) for raw in saved.state["done"]]
        for name in self._wanted:
            if any(s.name == name for s in done) or self._stopped:
                continue
            here = saved if saved is not None and saved.state["stage"] == name else None
            began = self.elapsed() if here is None else float(here.state["began"])
            before = {n: p.detach().clone() for n, p in self.student.parameters().items()}
            first = self._check() if here is None else None
            loss_before = first.loss if first is not None else float(here.state["loss_before"])  # type: ignore[union-attr]
            if here is not None:
                before = {n: here.tensors[f"entry/{n}"] for n in before}
            self.entry = (began, loss_before, before)
            both = name == "layers" and "end" in self._wanted
            until = began + (limit - began) * LAYERS_TIME if both else limit
            run = self._layers if name == "layers" else self._end
            outcomes, made = run(until, here, done)
            after = self._check().loss
            kept = self._is_nearer(before)
            done.append(self._stage(name, outcomes, made, (loss_before, after), kept, self.elapsed() - began, proof))
            if not self._stopped:
                self._keeper("", 0, done).write({}, {})
        return done

    @torch.no_grad()
    def _is_nearer(self, before: Mapping[str, torch.Tensor]) -> bool:
        """True if the student's validation answers, as they are used and not softened, are at least as near to the
        teacher's as with the weights `before`; else those are put back.

        Softened scores speak of all classes alike: they can come nearer while the first answers go away.
        """
        parameters = self.student.parameters()
        now = {n: p.clone() for n, p in parameters.items()}
        nearer = self._check(temperature=1.0).loss
        for n, p in parameters.items():
            p.copy_(before[n])
        if not nearer <= self._check(temperature=1.0).loss:  # a loss that is no number is no nearer
            return False
        for n, p in parameters.items():
            p.copy_(now[n])
        return True

    def _train_until(self) -> float:
        seconds = self.asked.seconds
        return float("inf") if seconds is None else max(seconds - max(PROOF_S, PROOF_SHARE * seconds), 1.0)

    def _layers(self, until: float, here: Saved | None, done: Sequence[Stage]) -> tuple[list[Outcome], list[Block]]:
        found = blocks.blocks(self.student_model, self._pairs)
        asked = self.asked
        if not found:
            self.notes.append(Note("layers", "no inner tensor of the student stands for one of the teacher: left out"))
            return [], []
        last = blocks.tail(self.student_model, self._pairs)
        found += [] if last is None else [last]
        shapes = {n: x.shape for n, x in next(iter(self._validation.batches())).feeds.items()}
        macs = {n.name: n.macs or 0 for n in cost.costs(self.student_model, input_shapes=shapes).nodes}
        each = None if asked.max_steps is None else max(1, asked.max_steps // len(found))
        job = layerwise.Blockwise(
            self.student.executor, found, [1 + sum(macs.get(n, 0) for n in b.nodes) for b in found],
            lambda rate: Recipe(rate, most_steps=each, checks=6, patience=6), self._units,
            [t.name for t in self._targets], self._matching.outputs, asked.seed, asked.rate,
            asked.rounding == "learned",
        )  # fmt: skip
        start = None if here is None else (int(here.state["block"]), here.state["trainer"], here.tensors)
        began = self.entry[0]
        lessons = self._lessons()
        checks = Lessons(
            self._validation, self._ask, batch=asked.batch_size, micro=self._memory.micro, seed=asked.seed,
            how=augment.Augment(), labels=False,
        )  # fmt: skip
        made, outcomes = layerwise.train_blocks(
            job, lessons, checks, self.work / "blocks", views=layerwise.views_for(until - began, each, lessons),
            by_time=each is None, seconds=until - began,
            keeper=lambda k: self._keeper("layers", k, done), start=start, progress=self.progress,
            stop=lambda: self._stopped, clock=lambda: self.elapsed() - began,
        )  # fmt: skip
        return outcomes, made

    def _end(self, until: float, here: Saved | None, done: Sequence[Stage]) -> tuple[list[Outcome], list[Block]]:
        limit = self.asked.max_memory
        keep = KEPT_BYTES if limit is None else min(max(limit - self._memory.predicted, 0), KEPT_BYTES)
        lessons = self._lessons(names=[*(t.name for t in self._targets), *self._matching.inner], keep=keep)
        if here is None:  # else the maps are in the checkpoint
            deadline = self.elapsed() + MAPS_SHARE * (until - self.elapsed())
            self._matching.fit(lessons.epoch(), lambda: self._stopped or self.elapsed() > deadline)
        if self._memory.recompute:
            cuts = [p.student for p in self._matching.pairs or self._pairs]
            reads = [b.starts for b in blocks.blocks(self.student_model, [Pair(c, c) for c in cuts])]
            last = blocks.reads_behind(self.student_model, cuts[-1]) if cuts else tuple(shapes_of(self.student_model))
            self.student.recompute_between(cuts, [*reads, last])
        work = Work(
            self.student.parameters(), self._units,
            lambda step, _done: steps_of(lessons, self._matching, step), self._check, self._matching.fixed,
        )  # fmt: skip
        most = 0 if self.asked.rate else RETREATS
        recipe = Recipe(self._rate, ema=self.asked.ema, most_steps=self.asked.max_steps, retreats=most)
        spent = 0.0 if here is None else float(here.state["trainer"]["seconds"])
        trainer = Trainer(
            work, recipe, seconds=until - self.elapsed() + spent, keeper=self._keeper("end", 0, done),
            progress=self.progress, name="end to end", stop=lambda: self._stopped,
        )  # fmt: skip
        if here is not None:
            trainer.resume(here.state["trainer"], here.tensors)
        outcome = trainer.run()
        self.student.keep_everything()
        return [outcome], []

    def write_student(self, path: Path) -> None:
        """Save the student as it is now, in its own encodings."""
        io.save(self.student.executor.write_back(self.student_model), path)

    def _stage(
        self, name: str, outcomes: Sequence[Outcome], made: Sequence[Block], loss: tuple[float, float], kept: bool,
        seconds: float, proof: Proof,
    ) -> Stage:  # fmt: skip
        """The stage's file on the holdout."""
        self.progress.start("measuring the saved student")
        path = self.work / f"{name}.onnx"
        self.write_student(path)
        reasons = list(dict.fromkeys(o.reason for o in outcomes)) or ["nothing to train"]
        if not kept and loss[1] <= loss[0]:
            reasons.insert(0, "only the softened validation loss fell")
        return Stage(
            name, seconds, sum(o.steps for o in outcomes), *loss, kept, "; ".join(reasons[:3]), proof.measured(path),
            outcomes[0].curve if name == "end" and outcomes else (), tuple(made),
            (self._rate, outcomes[0].rate) if name == "end" and outcomes else None,
        )  # fmt: skip

    def _finish(self, proof: Proof, stages: list[Stage]) -> Distilled:
        """Write the model and measure it."""
        target = self.out / "model.onnx"
        self.write_student(target)
        self.progress.start("measuring the result")
        teacher, before, after, gain = proof.final(target)
        if not any(s.kept for s in stages):
            self.notes.append(Note("result", "no stage brought validation answers nearer: the student is as it was"))
        began, rate = next((s.rates for s in stages if s.rates), (self._rate, self._rate))
        if rate < began:
            lowered = f"lowered from {began:.2g} to {rate:.2g}, as the loss on validation data rose"
            self.notes.append(Note("learning rate", lowered))
        facts = {
            "teacher": str(self.asked.teacher), "student": self.asked.student_name, "data": self._train.source,
            "samples": {"training": self._train.n_samples, "validation": self._validation.n_samples,
                        "holdout": self._holdout.n_samples},
            "augment": str(self._how), "batch": self.asked.batch_size, "micro_batch": self._memory.micro,
            "recompute": self._memory.recompute, "predicted_peak_bytes": self._memory.predicted,
            "threads": self._threads, "seed": self.asked.seed, "temperature": self._weights.temperature,
            "features": self._weights.features, "rate": rate,
            "matched": [p.student for p in self._matching.pairs],
        }  # fmt: skip
        if not self._stopped:
            shutil.rmtree(self.work, ignore_errors=True)
        return Distilled(
            self.out, target, teacher, before, after, gain.value, gain.interval, proof.reason,
            tuple(map(str, self._targets)), tuple(stages), self.elapsed(), resident_bytes("VmHWM"),
            tuple(self.notes), facts, self._stopped,
        )  # fmt: skip


def shapes_of(model: ir.Model) -> list[str]:
    """Names of the model's inputs."""
    return [v.name or "" for v in model.graph.inputs if not v.is_initializer()]
