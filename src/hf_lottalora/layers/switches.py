"""What the layers of a model share, so that none of them is switched without the tensors beside it."""

from __future__ import annotations


class Switches:
    """Shared by the layers of a model: the adapters that also train tensors beside them, and who is switching."""

    def __init__(self) -> None:
        self.trained: set[str] = set()
        self.by_model = False

    def check(self, call: str) -> None:
        """Refuse to switch the layers alone.

        Raises:
            ValueError: adapters train tensors beside the layers, and the model does not know of the call.
        """
        if self.trained and not self.by_model:
            raise ValueError(
                f"{call} of a layer, or of peft.functional, leaves out what adapters {sorted(self.trained)} train "
                f"beside the layers: embeddings, head or norms. Call the model's own {call}."
            )
