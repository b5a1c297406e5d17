from . import figures as figures
from . import graph as graph
from . import imageplots as imageplots
from . import plots as plots
from . import tensorplots as tensorplots
from .page import write_report as write_report
