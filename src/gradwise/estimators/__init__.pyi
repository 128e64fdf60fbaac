# Written by `python -m gradwise.core.rooms`; do not edit.
from gradwise.estimators.backprop import Backprop as Backprop
from gradwise.estimators.zo_bench import SPSA as SPSA
from gradwise.estimators.zo_bench import spsa as spsa
