"""Update rules. Configs and weights files refer to them by name."""

from learned_opt.rules.base import Observation, TensorGains, UpdateRule, make_rule, register
from learned_opt.rules.coordinatewise_lstm import CoordinatewiseLSTM
from learned_opt.rules.geodesic_rnn import GeodesicRNN
from learned_opt.rules.layout import Layout, State
from learned_opt.rules.rnnprop import RNNProp
from learned_opt.rules.scheduled import Scheduled

__all__ = [
    "CoordinatewiseLSTM",
    "GeodesicRNN",
    "Layout",
    "Observation",
    "RNNProp",
    "Scheduled",
    "State",
    "TensorGains",
    "UpdateRule",
    "make_rule",
    "register",
]
