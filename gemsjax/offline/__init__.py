"""Learning from logged episodes alone: compiled epochs over a data set, and bandits whose fixed points are known.

`training` has the pure functions, `runs` the loop around them that checkpoints and resumes. Called by experiments and
by anyone with logs of their own; imports no environments.
"""

from gemsjax.offline.runs import Learnt, learn
from gemsjax.offline.training import OfflinePlan, OfflineTraining, make_offline_training

__all__ = ["Learnt", "OfflinePlan", "OfflineTraining", "learn", "make_offline_training"]
