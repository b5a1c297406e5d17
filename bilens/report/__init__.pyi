from . import graph as graph
from . import imageplots as imageplots
from . import plots as plots
from .page import Finding as Finding
from .page import couplings_to_json as couplings_to_json
from .page import describe as describe
from .page import to_json as to_json
from .page import write_report as write_report
