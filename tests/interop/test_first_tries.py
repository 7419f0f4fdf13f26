"""What people try first with a store or a layer, by default and with row-sparse gradients."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from softdb import ArgumentError, SoftKVStore
from softdb.layers import MemoryLayer, ProductKeyMemory
from softdb.optim import RowAdagrad, RowAdam, clip_row_grad_norm_, other_parameters, row_parameters

pytestmark = [
    pytest.mark.slow,
    # torch.optim.Adagrad emits this warning.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """A classifier with a store, a layer of each kind with rows, and layers of torch."""

    def __init__(self, *, sparse_grad: bool | None = None) -> None:
        super().__init__()
        options = {} if sparse_grad is None else {"sparse_grad": sparse_grad}
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.memory = MemoryLayer(8, rows=40, heads=2, key_dim=4, mode="topk", k=4, **options)
        self.products = ProductKeyMemory(8, rows=25, heads=1, k=4, key_dim=8, **options)
        self.store = SoftKVStore(8, 8, trainable=True, capacity=30, **options)
        self.store.add(normal(20, 8), normal(20, 8, seed=1))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        x = self.first(x)
        x = x + self.memory(x)
        x = x + self.products(x)
        logits = self.last(x + self.store(x, mode="topk", k=4))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def make_data(rows: int = 64) -> TensorDataset:
    x = normal(rows, 8, seed=5)
    return TensorDataset(x, x[:, :3].argmax(-1))


X, LABELS = make_data().tensors


def compute_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), LABELS)


def evaluate(model: nn.Module) -> float:
    with torch.no_grad():
        return float(compute_loss(model))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 8) -> tuple[float, float]:
    """Take steps on all data; return the first and the last loss."""
    losses = []
    for _ in range(steps):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = compute_loss(model)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    return losses[0], evaluate(model)


def assert_trained(model: Model, first: float, last: float) -> None:
    assert last < first
    for module in model.modules():
        if isinstance(module, SoftKVStore):
            module._check()
    for parameter in model.parameters():
        assert parameter.isfinite().all()


# -- optimizers ----------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum and weight decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.02),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.003),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.2, max_iter=4),
    "RowAdam": lambda p: RowAdam(p, lr=0.01),
    "RowAdagrad": lambda p: RowAdagrad(p, lr=0.1),
}
# Optimizers that accept row-sparse gradients. The others raise softdb's own error.
ACCEPT_SPARSE = {"SGD", "SGD, Nesterov", "SGD, foreach", "Adagrad", "RowAdam", "RowAdagrad"}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_an_optimizer_by_default(name: str) -> None:
    model = Model()
    assert_trained(model, *train(model, OPTIMIZERS[name](model.parameters())))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "LBFGS"])
def test_an_optimizer_with_row_sparse_gradients(name: str) -> None:
    model = Model(sparse_grad=True)
    optimizer = OPTIMIZERS[name](model.parameters())
    if name in ACCEPT_SPARSE:
        assert_trained(model, *train(model, optimizer))
        return
    before = copy.deepcopy(model.state_dict())
    compute_loss(model).backward()
    with pytest.raises(ArgumentError, match=r"softdb\.optim\.RowAdam.*sparse_grad=False"):
        optimizer.step()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_sparse_adam_for_rows_and_adamw_for_others() -> None:
    model = Model(sparse_grad=True)
    rows, others = (
        torch.optim.SparseAdam(list(row_parameters(model)), lr=0.01),
        torch.optim.AdamW(other_parameters(model), lr=0.01),
    )
    first = evaluate(model)
    for _ in range(10):
        model.zero_grad()
        compute_loss(model).backward()
        rows.step()
        others.step()
    assert_trained(model, first, evaluate(model))
    dense = Model()
    compute_loss(dense).backward()
    with pytest.raises(ArgumentError, match=r"SparseAdam; use softdb\.optim\.RowAdam"):
        torch.optim.SparseAdam(list(row_parameters(dense))).step()


# -- loops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [torch.nn.utils.clip_grad_norm_, clip_row_grad_norm_])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_clipping_by_norm(sparse_grad: bool, clip: Callable[..., Tensor]) -> None:
    model = Model(sparse_grad=sparse_grad)
    (100 * compute_loss(model)).backward()
    clip(model.parameters(), 1.0)
    gradients = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters() if p.grad is not None]
    assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(1.0, abs=1e-3)


def test_clipping_by_value() -> None:
    model = Model()
    (100 * compute_loss(model)).backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.5)
    assert all(p.grad.abs().max() <= 0.5 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_grad_scaler_and_autocast_and_accumulation(sparse_grad: bool) -> None:
    model = Model(sparse_grad=sparse_grad)
    optimizer = RowAdam(model.parameters(), lr=0.01) if sparse_grad else torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler, first = torch.amp.GradScaler("cpu"), evaluate(model)
    for _ in range(10):
        optimizer.zero_grad()
        for part in (slice(0, 32), slice(32, 64)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(X[part]), LABELS[part]) / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert_trained(model, first, evaluate(model))


def test_accumulated_gradients_equal_those_of_one_batch() -> None:
    whole, parts = Model().double(), Model().double()
    F.cross_entropy(whole(X.double()), LABELS).backward()
    for part in (slice(0, 32), slice(32, 64)):
        (F.cross_entropy(parts(X[part].double()), LABELS[part]) / 2).backward()
    for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=12),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    "ReduceLROnPlateau": torch.optim.lr_scheduler.ReduceLROnPlateau,
}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, RowAdam], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_learning_rate_schedule(name: str, kind: Any) -> None:
    model = Model(sparse_grad=kind is RowAdam)
    optimizer = kind(model.parameters(), lr=0.01)
    schedule, first = SCHEDULES[name](optimizer), evaluate(model)
    for _ in range(12):
        train(model, optimizer, 1)
        schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert_trained(model, first, evaluate(model))


# AdamW refuses row-sparse gradients.
@pytest.mark.parametrize(("kind", "sparse_grad"), [(torch.optim.AdamW, False), (RowAdam, False), (RowAdam, True)])
def test_a_run_resumes_from_a_checkpoint_of_torch(kind: Any, sparse_grad: bool) -> None:
    model = Model(sparse_grad=sparse_grad)
    optimizer = kind(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    wanted = train(model, optimizer, 3)
    file.seek(0)
    saved, resumed = torch.load(file, weights_only=True), Model(sparse_grad=sparse_grad)
    resumed.load_state_dict(saved["model"])
    optimizer = kind(resumed.parameters(), lr=0.01)
    optimizer.load_state_dict(saved["optimizer"])
    assert train(resumed, optimizer, 3) == pytest.approx(wanted, rel=1e-5)


def test_parameter_groups_without_weight_decay_for_rows() -> None:
    model = Model()
    groups = [{"params": row_parameters(model), "weight_decay": 0.0}, {"params": other_parameters(model)}]
    assert_trained(model, *train(model, torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)))


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_frozen_rows_train_the_rest(sparse_grad: bool) -> None:
    model = Model(sparse_grad=sparse_grad)
    for parameter in row_parameters(model):
        parameter.requires_grad_(False)
    before = [parameter.clone() for parameter in row_parameters(model)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    assert_trained(model, *train(model, optimizer))
    assert all(torch.equal(now, old) for now, old in zip(row_parameters(model), before, strict=True))


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_copies_train_independently(sparse_grad: bool) -> None:
    model = Model(sparse_grad=sparse_grad)
    optimizer = RowAdam(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))
    before = copied(X)
    train(model, optimizer, 2)
    assert torch.equal(copied(X), before)
    train(copied, RowAdam(copied.parameters(), lr=0.01), 2)


def test_a_compiled_model_trains() -> None:
    model = Model()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    first = evaluate(compiled)
    train(compiled, optimizer, 6)
    assert_trained(model, first, evaluate(model))


# -- trainers ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("clipping", "sparse_grad"), [("norm", False), ("value", False), ("norm", True)])
def test_lightning_fits_with_clipping_and_resumes(clipping: str, sparse_grad: bool, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(sparse_grad=sparse_grad)
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            return (RowAdam if sparse_grad else torch.optim.AdamW)(self.parameters(), lr=0.01)

    def make_trainer(epochs: int) -> Any:
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            gradient_clip_val=1.0,
            gradient_clip_algorithm=clipping,
        )

    loader = DataLoader(make_data(), batch_size=32)
    whole, part, resumed = Task(), Task(), Task()
    make_trainer(4).fit(whole, loader)
    assert_trained(whole.model, whole.losses[0], whole.losses[-1])
    trainer = make_trainer(2)
    trainer.fit(part, loader)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    make_trainer(4).fit(resumed, loader, ckpt_path=tmp_path / "part.ckpt")
    assert resumed.losses == pytest.approx(whole.losses[len(part.losses) :], rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", ["AdamW", "RowAdam"])
def test_the_trainer_of_transformers_fits_and_resumes(optimizer: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    data = [{"x": x, "labels": label} for x, label in zip(X, LABELS, strict=True)]

    def run(steps: int, resume: str | None = None) -> tuple[Model, list[float]]:
        model = Model(sparse_grad=optimizer == "RowAdam")
        arguments = transformers.TrainingArguments(
            str(tmp_path / f"run {steps}"),
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=0.01,
            logging_steps=1,
            save_steps=4,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        own = (RowAdam(model.parameters(), lr=0.01), None) if optimizer == "RowAdam" else (None, None)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=own)
        trainer.train(resume_from_checkpoint=resume)
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model, losses = run(8)
    assert_trained(model, losses[0], losses[-1])
    resumed, again = run(8, str(tmp_path / "run 8" / "checkpoint-4"))
    assert again[-4:] == pytest.approx(losses[-4:], rel=1e-3)
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_accelerate_prepares_clips_and_resumes(sparse_grad: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Model(sparse_grad=sparse_grad)
    optimizer = (RowAdam if sparse_grad else torch.optim.AdamW)(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=40)
    prepared = accelerator.prepare(model, optimizer, DataLoader(make_data(), batch_size=16), schedule)
    model, optimizer, loader, schedule = prepared
    first = evaluate(model)

    def run(epochs: int) -> float:
        for _ in range(epochs):
            for x, labels in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(F.cross_entropy(model(x), labels))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
        return evaluate(model)

    run(2)
    accelerator.save_state(str(tmp_path))
    wanted = run(1)
    accelerator.load_state(str(tmp_path))
    assert run(1) == pytest.approx(wanted, rel=1e-4)
    assert_trained(accelerator.unwrap_model(model), first, wanted)


# -- the table -----------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_each_optimizer() -> None:
    page = (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text(encoding="utf-8")
    table = page.split("## What people try first")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) >= 40
    sparse = {line[0]: line[2] for line in lines}
    assert set(OPTIMIZERS) <= set(sparse)
    assert {name for name in OPTIMIZERS if sparse[name] == "works"} == ACCEPT_SPARSE
    assert {name for name in OPTIMIZERS if sparse[name] == "error"} == set(OPTIMIZERS) - ACCEPT_SPARSE - {"LBFGS"}
