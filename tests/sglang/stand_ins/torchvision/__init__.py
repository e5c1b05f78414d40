"""Stand-in for ``torchvision``: imported for pictures, used by no text model.

Its wheel has compiled operators that load only beside the CUDA build of torch it was made for.
"""

__version__ = "0.0.0+standin"
