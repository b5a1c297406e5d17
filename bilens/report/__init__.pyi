from . import graph as graph
from . import imageplots as imageplots
from . import plots as plots
from .page import write_report as write_report
