"""Losses and gradients that are not finite, looked for in many updates at once: to look is to wait for the GPU."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class FiniteCheck:
    """Notes of updates, on the device where they are made, until somebody looks at them."""

    def __init__(self) -> None:
        self.noted: list[tuple[Tensor, list[str], str]] = []

    def note(self, values: dict[str, Tensor], place: str) -> None:
        """Note whether the values of an update, scalars by what they are, are finite, and which update it is."""
        whole = [value.full_tensor() if isinstance(value, DTensor) else value for value in values.values()]
        finite = torch.stack([value.detach().isfinite().reshape(()) for value in whole])
        self.noted.append((finite, [*values], place))

    def find(self) -> str | None:
        """Forget all notes. Returns which value of which update was the first that is not finite, or None."""
        noted, self.noted = self.noted, []
        if noted:
            for finite, (_, names, place) in zip(torch.stack([one[0] for one in noted]).tolist(), noted, strict=True):
                for is_finite, name in zip(finite, names, strict=True):
                    if not is_finite:
                        return f"the {name} is not finite at {place}"
        return None
