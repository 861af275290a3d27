"""LSTMs swapped inside models of other libraries: Hugging Face transformers and Lightning."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import EncodecConfig, EncodecModel

import fastlstm
from cases import tolerance

# --- transformers ------------------------------------------------------------------------


def encodec() -> EncodecModel:
    """A small one of its kind; an LSTM of two layers in the encoder, and one in the decoder."""
    config = EncodecConfig(
        num_filters=2, hidden_size=8, codebook_dim=8, codebook_size=16, upsampling_ratios=[4, 2]
    )
    return EncodecModel(config)


def gradients(model: EncodecModel, sound: Tensor) -> list[Tensor]:
    decoded = model.decoder(model.encoder(sound))
    weights = [*model.encoder.parameters(), *model.decoder.parameters()]
    return [decoded, *torch.autograd.grad(decoded.square().mean(), weights)]


def of_type(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in model.modules())


def test_a_transformers_model_trains_and_is_saved(tmp_path: Path) -> None:
    stock, sound = encodec(), torch.randn(2, 1, 320)
    ours = copy.deepcopy(stock)
    report = fastlstm.replace_lstm_(ours)
    assert len(report.replaced) == 2 and not report.skipped, str(report)
    for a, b in zip(gradients(ours, sound), gradients(stock, sound), strict=True):
        torch.testing.assert_close(a, b, **tolerance(sound.dtype))
    ours.save_pretrained(tmp_path)
    loaded = EncodecModel.from_pretrained(tmp_path)
    assert of_type(loaded, nn.LSTM) == 2
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name


def test_transformers_builds_ours_under_a_patch(tmp_path: Path) -> None:
    """Its initialization asks isinstance(m, nn.LSTM)."""
    stock = encodec()
    stock.save_pretrained(tmp_path)
    with fastlstm.patch(compat=True):
        ours = EncodecModel.from_pretrained(tmp_path)
    assert of_type(ours, fastlstm.compat.LSTM) == 2
    sound = torch.randn(2, 1, 320)
    for a, b in zip(gradients(ours, sound), gradients(stock.eval(), sound), strict=True):
        torch.testing.assert_close(a, b, **tolerance(sound.dtype))


# --- Lightning ---------------------------------------------------------------------------


class Tagger(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 8, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(8, 1)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = self.head(self.rnn(batch[0])[0]).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_lightning_module_trains_and_is_saved(precision: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(12, 5, 4, generator=generator)), batch_size=4)

    def trained(swap: bool, precision: str) -> Tagger:
        torch.manual_seed(1)
        model = Tagger()
        if swap:
            assert fastlstm.replace_lstm_(model).replaced == ["rnn"]
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=2, precision=precision, default_root_dir=tmp_path, **quiet
        )
        trainer.fit(model, data)
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        return model

    with warnings.catch_warnings(action="ignore"):  # Lightning's, of workers
        # nn.LSTM in float32: under autocast it fails on a processor with AVX2 alone.
        stock, ours = (
            trained(swap=False, precision="32-true"),
            trained(swap=True, precision=precision),
        )
    near = tolerance(torch.float32 if precision == "32-true" else torch.bfloat16)
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(stock.losses), **near)
    assert ours.losses[-1] < ours.losses[0]
    loaded = Tagger.load_from_checkpoint(tmp_path / "model.ckpt")
    assert type(loaded.rnn) is nn.LSTM
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name
