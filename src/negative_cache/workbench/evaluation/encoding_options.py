"""How texts are encoded. Only the check of a device imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from negative_cache.workbench.evaluation.defaults import DTYPES


class EncodingError(ValueError):
    """Options of the encoding that are invalid."""


@dataclass(frozen=True)
class EncodingOptions:
    """How queries and documents are encoded; validated on construction.

    Attributes:
        query_prompt: Text before each query; None for the model's own prompt.
        document_prompt: Text before each document; None for the model's own prompt.
        max_seq_length: Tokens after which a text is cut; None for the model's own limit.
        truncate_dim: Use this number of dimensions of the embeddings; None for all, or the model's own setting.
        batch_size: Texts per batch; None for 32, or 256 with a static model.
        dtype: dtype of the weights: float32, bfloat16 or float16; None to leave it.
        device: Device of the model, or several, such as "cuda:0,cuda:1", with a process each; None for the model's own.

    Raises:
        EncodingError: A value is invalid, or a device is not available.
    """

    query_prompt: str | None = None
    document_prompt: str | None = None
    max_seq_length: int | None = None
    truncate_dim: int | None = None
    batch_size: int | None = None
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_seq_length", "truncate_dim", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EncodingError(f"--{name.replace('_', '-')} is {value}; it must be positive.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise EncodingError(f"--dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}.")
        if self.devices:
            import torch  # which takes more than a second
        for device in self.devices:
            try:
                torch.empty(1, device=device)
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise EncodingError(
                    f"--device {self.device!r}: {device!r} is not available ({reason}). Give a device such as cpu or "
                    "cuda:0, or several such as cuda:0,cuda:1."
                ) from None

    @property
    def devices(self) -> list[str]:
        """The devices; empty for the model's own."""
        return [] if self.device is None else [name.strip() for name in self.device.split(",")]
