"""Traces a PyTorch model into a channel graph, with the means to prove every removal."""

from prunus.adapters.pytorch.tracing.masked import masked_call
from prunus.adapters.pytorch.tracing.trace import LiteralSite, Trace, trace_model, with_batch

__all__ = ["LiteralSite", "Trace", "masked_call", "trace_model", "with_batch"]
