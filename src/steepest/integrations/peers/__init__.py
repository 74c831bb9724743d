"""Coming from another library: its optimizer's state taken over, its options in the words of this library.

Needs none of these libraries: a state is the dictionary that their `state_dict()` returned.
"""

from steepest.integrations.peers.conventions import PEERS as PEERS
from steepest.integrations.peers.conventions import TranslatedOption as TranslatedOption
from steepest.integrations.peers.conventions import Translation as Translation
from steepest.integrations.peers.conventions import translate as translate
from steepest.integrations.peers.sources import SOURCES as SOURCES
from steepest.integrations.peers.states import Report as Report
from steepest.integrations.peers.states import ReportRow as ReportRow
from steepest.integrations.peers.states import import_state as import_state
