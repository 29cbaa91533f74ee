"""Which layers, how much, and not below which floor: `advise`, `sensitivity`, `search`."""

from lightning_compress.choosing.advice import Advice
from lightning_compress.choosing.advise import advise
from lightning_compress.choosing.result import Point, SearchResult
from lightning_compress.choosing.search import search
from lightning_compress.choosing.sensitivity import sensitivity
from lightning_compress.choosing.table import SensitivityRow, SensitivityTable

__all__ = ["Advice", "Point", "SearchResult", "SensitivityRow", "SensitivityTable", "advise", "search", "sensitivity"]
