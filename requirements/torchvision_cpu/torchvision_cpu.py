"""Lets PyPI's torchvision, a CUDA build, be imported beside a CPU build of torch.

Its compiled operators cannot be loaded there, and its import then fails because two of them are not
even declared. vLLM's LLaVA family and transformers' image processors need none of them, so this
declares the two, right before torchvision asks. A .pth file imports this module when Python starts.
"""

import sys

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept = []  # a library's declarations end with it


class _Finder:
    """Finds nothing; being asked for torchvision's registrations tells that they come next."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            sys.meta_path.remove(self)
            from torchvision.extension import _has_ops

            if not _has_ops():
                import torch

                library = torch.library.Library("torchvision", "FRAGMENT")
                for schema in _SCHEMAS:
                    library.define(schema)
                _kept.append(library)
        return None


sys.meta_path.insert(0, _Finder())
