"""Stand-in for ``torchaudio.functional``."""
