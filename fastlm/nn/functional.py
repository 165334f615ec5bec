"""torch.nn.functional's own signatures on fastlm's ops: changing the import is the whole migration."""

from fastlm.nn._losses import cross_entropy, linear_cross_entropy

__all__ = ["cross_entropy", "linear_cross_entropy"]
