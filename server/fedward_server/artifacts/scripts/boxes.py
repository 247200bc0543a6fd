"""From a detector's output to boxes in the image's own pixels, as MONAI transforms.

A bundle of a detector carries this file as ``scripts/boxes.py``; it needs MONAI and torch.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from torch import Tensor

Data = Mapping[Hashable, Any]
_CANDIDATES = 300  # boxes of a class before the suppression of those that overlap
_SAME = 0.5  # overlap at which two boxes of a class are of one thing
_MOST = 100  # of a class


class Boxesd(MapTransform):  # type: ignore[misc]
    """Logits and corners ``(K + 4, A)`` to boxes in pixels of the file's image, the surest first.

    A box is ``xmin, ymin, xmax, ymax``: the borders of the pixels that it covers, from the upper
    left corner of the image on.

    Parameters
    ----------
    keys : str or sequence of str
        The output; it becomes a dictionary with ``box`` ``(n, 4)``, ``label`` ``(n,)``, the class
        from 0, and ``label_scores`` ``(n,)``.
    image_key : str
        The image that the network took, with what was done to it.
    least : float
        Score from which on a box is told.
    """

    def __init__(self, keys: KeysCollection, image_key: str, least: float) -> None:
        super().__init__(keys)
        self.image_key, self.least = image_key, least

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Change the outputs of the keys."""
        result = dict(data)
        for key in self.key_iterator(result):
            output = torch.as_tensor(result[key], dtype=torch.float64)
            logits, corners = output[:-4].sigmoid(), output[-4:].T
            found = [self._of_class(k, one, corners) for k, one in enumerate(logits)]
            box, label, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
            order = scores.argsort(descending=True, stable=True)
            moved = _on_file(box[order], result[self.image_key])
            result[key] = {
                "box": moved[:, [1, 0, 3, 2]],
                "label": label[order],
                "label_scores": scores[order],
            }
        return result

    def _of_class(self, k: int, scores: Tensor, corners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order = scores.argsort(descending=True, stable=True)[:_CANDIDATES]
        order = order[scores[order] >= self.least]
        own = order[_apart(corners[order].clip(min=0))][:_MOST]
        return corners[own].clip(min=0), torch.full((len(own),), k), scores[own]


def _apart(corners: Tensor) -> list[int]:
    """Places of the boxes that no surer one, which comes before, overlaps too much."""
    low = torch.maximum(corners[:, None, :2], corners[None, :, :2])
    high = torch.minimum(corners[:, None, 2:], corners[None, :, 2:])
    both = (high - low).clip(min=0).prod(2)
    area = (corners[:, 2:] - corners[:, :2]).prod(1)
    shared = both / (area[:, None] + area[None, :] - both) > _SAME
    free, kept = torch.ones(len(corners), dtype=torch.bool), []
    for place in range(len(corners)):
        if free[place]:
            kept.append(place)
            free &= ~shared[place]
    return kept


def _on_file(corners: Tensor, image: Any) -> Tensor:
    """Corners on the prepared image where they are on that of the file, cut at its border."""
    done = {one["class"]: one for one in image.applied_operations}
    grid, border = done["Resampled"], done["Finishd"]["extra_info"]["starts"]
    before, extra = grid["orig_size"], grid["extra_info"]
    factors = extra["scale"] or [a / b for a, b in zip(extra["after"], before, strict=True)]
    start = corners.new_tensor([s - b for s, b in zip(extra["starts"], border, strict=True)])
    ends = corners.reshape(-1, 2, 2)
    ends = (ends + start) / corners.new_tensor(factors)
    sides = corners.new_tensor([float(n) for n in before])
    return torch.minimum(ends.clip(min=0), sides).reshape(-1, 4)


class SaveBoxesd(MapTransform):  # type: ignore[misc]
    """Write the boxes of an image as ``NAME_boxes.json``, in the words of MONAI's detectors.

    Parameters
    ----------
    keys : str or sequence of str
        What :class:`Boxesd` made.
    image_key : str
        The image, which knows its file.
    output_dir : str
        Where; made if it is not there.
    classes : sequence of str
        Their names.
    """

    def __init__(
        self, keys: KeysCollection, image_key: str, output_dir: str, classes: Sequence[str]
    ) -> None:
        super().__init__(keys)
        self.image_key, self.output_dir, self.classes = image_key, output_dir, classes

    def __call__(self, data: Data) -> dict[Hashable, Any]:
        """Write those of the keys; the data stay as they are."""
        result = dict(data)
        name = Path(str(result[self.image_key].meta["filename_or_obj"])).name
        folder = Path(self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for key in self.key_iterator(result):
            found = {part: value.tolist() for part, value in result[key].items()}
            found["label"] = [self.classes[k] for k in found["label"]]
            text = json.dumps({"image": name, **found}, indent=1, ensure_ascii=False)
            (folder / f"{name}_boxes.json").write_text(text + "\n", "utf-8")
        return result
