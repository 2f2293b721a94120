"""Evaluation: perplexity, and how far a quantized model is from its source, token by token and layer by layer."""

from transload.evaluation.result import Difference, EvalReport, Subject, WorstToken
from transload.evaluation.run import Request, evaluate

__all__ = ["Difference", "EvalReport", "Request", "Subject", "WorstToken", "evaluate"]
