"""`Training`: the loop. Steps, evaluations, states on disk, and what is left of it when it is stopped."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..processes import Processes
from ..report import DistillReport, StepRow
from ..run_folder import load_tensors, save_tensors, whole
from .config import DistillConfig
from .objective import Call
from .schedule import Schedule
from .student import Student, put
from .student import whole as put_together
from .teacher import Objective, Teacher

Progress = Callable[[int, int, str], None]

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter, beside the number of steps."""

_STATE, _BEST = "state.safetensors", "best.safetensors"


class Training:
    """One run.

    Args:
        student: what is trained.
        teacher: gives targets by the number of a call: training calls first, held-out ones behind them.
        objective: what is compared.
        calls: training batches.
        held_out: batches that say which state is best.
        config: how.
        folder: where the best state lies, and states for `resume`.
        durable: whether states for `resume` are written.
        processes: those that share every step.
        autocast: the precision of products.
        progress: called as progress(done, total, what).
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        objective: Objective,
        calls: Sequence[Call],
        held_out: Sequence[Call],
        config: DistillConfig,
        folder: Path,
        *,
        durable: bool,
        processes: Processes,
        autocast: Callable[[], Any],
        progress: Progress | None,
    ) -> None:
        self.student, self.teacher, self.objective, self.config = student, teacher, objective, config
        self.calls, self.held_out, self.folder, self.durable = calls, held_out, folder, durable
        self.processes, self.autocast, self.progress = processes, autocast, progress
        self.schedule = Schedule(config, sum(map(objective.count, calls)) / len(calls))
        self.optimizer = torch.optim.AdamW(
            student.parameters.values(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._kept = [parameter.detach() != 0 for parameter in student.parameters.values()] if config.keep_zeros else []
        self.rows: list[StepRow] = []
        self.before = math.nan
        self.best = math.nan
        self.best_step = 0
        self._earlier = 0.0
        self._started = self._saved = time.monotonic()
        self._orders: dict[int, list[int]] = {}

    def best_values(self) -> dict[str, Tensor]:
        """What is trained, whole, in its best state; nothing if that is the one to start with."""
        found = load_tensors(self.folder / _BEST) if self.best_step else None
        return {} if found is None else found[0]

    def run(self) -> DistillReport:
        """Trains; `best_values` has the result.

        A KeyboardInterrupt ends the run as its end would, if this process is alone in it.

        Raises:
            CalibrationError: the loss or a gradient is not finite.
            OffloadError: a state cannot be written or read.
        """
        resumed, interrupted, notes = self._load(), False, list[str]()
        try:
            if not resumed:
                seconds = self._seconds()
                self.before = self.best = self._evaluate()
                self.schedule.reserve = self._seconds() - seconds
            self.schedule.fit(len(self.held_out))
            if self.config.minutes is not None and self.config.batches_per_step is None:
                notes.append(f"{self.schedule.batches} batches for a step")
            if self.objective.name == "logits":
                self.schedule.start(self.before)
            self._train(notes)
        except KeyboardInterrupt:
            if self.processes.size > 1:
                raise  # the others may wait for this one
            interrupted = True
            notes.append(f"interrupted after {len(self.rows)} steps; the best state until then was kept")
        finally:
            self.optimizer.state.clear()  # what is left to do needs the memory
            self.optimizer.zero_grad()
        if not self.best_step:
            notes.append("no state was better on the held-out batches than the one to start with, which was kept")
        return DistillReport(
            loss=self.objective.name,
            trained=self.student.numbers,
            held_out_before=self.before,
            held_out_after=self.best,
            best_step=self.best_step,
            seconds=self._seconds(),
            interrupted=interrupted,
            steps=self.rows,
            notes=notes,
        )

    def _seconds(self) -> float:
        """Since the run began, on the first process's clock, without the time in which it was stopped."""
        own: float = self._earlier + time.monotonic() - self._started
        return float(self.processes.gather(own)[0])

    def _train(self, notes: list[str]) -> None:
        length = 1 / self.config.steps if self.config.steps else 0.0
        seconds = self._seconds()
        share = self.schedule.share(len(self.rows), seconds)
        while share + length / 2 < 1:
            rate = self.schedule.learning_rate(share, length)
            loss, norm = self._step(len(self.rows), rate)
            now = self._seconds()
            if self.config.minutes is not None:
                length = (now - seconds) / (60 * self.config.minutes)
            after = self.schedule.share(len(self.rows) + 1, now)
            held_out = None
            last = after + length / 2 >= 1
            if last or int(after * self.config.evaluations) > int(share * self.config.evaluations):
                held_out = self._evaluate()
            seconds = now if held_out is None else self._seconds()
            share = self.schedule.share(len(self.rows) + 1, seconds)
            self.rows.append(StepRow(len(self.rows) + 1, seconds, rate, loss, norm, held_out))
            self._tell(share, seconds)
            if held_out is not None and held_out < self.best:
                self.best, self.best_step = held_out, len(self.rows)
                self._write(_BEST, self.student.values(), {"held_out": self.best, "step": self.best_step})
            if self.durable and self._is_time_to_save():
                self.save()
            if self._misses() >= self.config.patience:
                notes.append(
                    f"stopped after {len(self.rows)} steps: {self.config.patience} evaluations without a better state"
                )
                return

    def _step(self, number: int, rate: float) -> tuple[float, float]:
        """One update; its loss and the norm of its gradient."""
        first = number * self.schedule.batches
        numbers = [self._batch(first + place) for place in range(self.schedule.batches)]
        scale = 1 / sum(self.objective.count(self.calls[each]) for each in numbers)
        loss = torch.zeros((), dtype=torch.float64, device=self.student.device)
        for each, counts in self._own(numbers):
            call = self.calls[each].to(self.student.device)
            target = self.teacher.target(each, call)
            with self.autocast(), torch.enable_grad():
                output = self.objective.output(self.student.copy, call)
                part = self.objective.loss(output, target, call, scale if counts else 0.0)
            loss += part.detach()
            del target
            # FSDP2 divides sums of gradients by the number of processes.
            part.backward(torch.tensor(float(self.processes.size if self.config.shard else 1), device=part.device))
            del output
        self._sum_gradients()
        for parameter, kept in zip(self.student.parameters.values(), self._kept, strict=False):
            if parameter.grad is not None:
                parameter.grad.mul_(kept)
        total = float(self.processes.sum({"loss": loss})["loss"])
        norm = put_together(
            torch.nn.utils.clip_grad_norm_(self.student.parameters.values(), self.config.clip, foreach=True)
        )
        if not (math.isfinite(total) and math.isfinite(float(norm))):
            raise CalibrationError(
                f"step {number + 1}: the loss is {total}, the norm of its gradient {float(norm)}; lower the learning "
                f"rate ({self.schedule.highest}), or pass bfloat16=False"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, float(norm)

    def _own(self, numbers: Sequence[int]) -> Iterator[tuple[int, bool]]:
        """The batches of this process, and whether each counts: of spread weights all processes call equally often."""
        own = [numbers[at] for at in self.processes.own(len(numbers))]
        yield from ((each, True) for each in own)
        if self.config.shard:
            missing = -(-len(numbers) // self.processes.size) - len(own)
            yield from ((numbers[0], False) for _ in range(missing))

    def _sum_gradients(self) -> None:
        if self.processes.size == 1 or self.config.shard:  # FSDP2 has summed them
            return
        parameters = self.student.parameters
        found = {name: each.grad for name, each in parameters.items() if each.grad is not None}
        for name, gradient in self.processes.sum(found).items():
            parameters[name].grad = gradient

    def _batch(self, place: int) -> int:
        """Which batch is the one at `place` of the run: all of them in turn, in another order every time."""
        turn, at = divmod(place, len(self.calls))
        if turn not in self._orders:
            generator = torch.Generator().manual_seed(self.config.seed + turn)
            self._orders = {turn: torch.randperm(len(self.calls), generator=generator).tolist()} | {
                key: order for key, order in self._orders.items() if key == turn - 1
            }
        return self._orders[turn][at]

    @torch.no_grad()
    def _evaluate(self) -> float:
        """The loss on the held-out batches.

        Raises:
            CalibrationError: it is not finite.
        """
        scale = 1 / sum(self.objective.count(call) for call in self.held_out)
        total = torch.zeros((), dtype=torch.float64, device=self.student.device)
        for each, counts in self._own(range(len(self.held_out))):
            call = self.held_out[each].to(self.student.device)
            target = self.teacher.target(len(self.calls) + each, call)
            with self.autocast():
                output = self.objective.output(self.student.copy, call)
            total += self.objective.loss(output, target, call, scale if counts else 0.0)
        found = float(self.processes.sum({"loss": total})["loss"])
        if not math.isfinite(found):
            raise CalibrationError(f"the loss on the held-out batches is {found}: check both models' weights")
        return found

    def _misses(self) -> int:
        """Evaluations since the best state."""
        return sum(row.held_out is not None for row in self.rows[self.best_step :])

    def _tell(self, share: float, seconds: float) -> None:
        if self.progress is None:
            return
        held_out = next((row.held_out for row in reversed(self.rows) if row.held_out is not None), self.before)
        what = f"loss {self.rows[-1].loss:.4f}, held out {held_out:.4f} ({self.before:.4f} before)"
        if self.config.steps is None:
            what = f"step {len(self.rows)}, {what}"
            self.progress(int(share * 1000), 1000, what)
        else:
            self.progress(len(self.rows), self.config.steps, what)

    def _is_time_to_save(self) -> bool:
        late = time.monotonic() - self._saved > 60 * self.config.save_minutes
        return bool(self.processes.gather(late)[0])

    def save(self) -> None:
        """Writes what a run that was stopped goes on from."""
        tensors = {f"value {name}": value for name, value in self.student.values().items()}
        steps = 0
        for name, parameter in self.student.parameters.items():
            state = self.optimizer.state.get(parameter)  # none of what the loss does not depend on
            if state:
                tensors.update({f"{moment} {name}": put_together(state[moment]) for moment in _MOMENTS})
                steps = int(state["step"])
        notes = {
            **{"steps": steps, "seconds": self._seconds(), "before": self.before, "reserve": self.schedule.reserve},
            "rows": [asdict(row) for row in self.rows],
        }
        self._write(_STATE, tensors, notes)
        self._saved = time.monotonic()

    def _write(self, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        if self.processes.is_first:
            save_tensors(self.folder / name, tensors, {"notes": json.dumps(notes)})
        self.processes.wait()

    def _load(self) -> bool:
        """Goes on from a state on disk, if there is one."""
        path = self.folder / _STATE
        found = load_tensors(path) if self.durable else None
        if found is None:
            return False
        tensors = found[0]
        with whole(path):
            notes = json.loads(found[1]["notes"])
            self._earlier, self._started = notes["seconds"], time.monotonic()
            self.before = self.best = notes["before"]
            self.schedule.reserve = notes["reserve"]
            self.rows = [StepRow(**row) for row in notes["rows"]]
            self.student.set({name: tensors[f"value {name}"] for name in self.student.parameters})
            for name, parameter in self.student.parameters.items():
                if f"{_MOMENTS[0]} {name}" not in tensors:
                    continue
                state: dict[str, Tensor] = {"step": torch.tensor(float(notes["steps"]), device=parameter.device)}
                for moment in _MOMENTS:
                    state[moment] = torch.zeros_like(parameter.detach())
                    put(state[moment], tensors[f"{moment} {name}"])
                self.optimizer.state[parameter] = state
        # Its own file says what it holds: it may have been written after the state.
        best = load_tensors(self.folder / _BEST, None)
        if best is not None:
            with whole(self.folder / _BEST):
                notes = json.loads(best[1]["notes"])
                self.best, self.best_step = notes["held_out"], notes["step"]
        return True
