"""Coming from another library: its optimizer's state taken over, its options in the words of this library.

Needs none of these libraries: a state is the dictionary that their `state_dict()` returned.
"""

from steepest.integrations.peers.conventions import PEERS, TranslatedOption, Translation, translate
from steepest.integrations.peers.sources import SOURCES
from steepest.integrations.peers.states import Report, ReportRow, import_state

__all__ = [
    "PEERS",
    "SOURCES",
    "Report",
    "ReportRow",
    "TranslatedOption",
    "Translation",
    "import_state",
    "translate",
]
