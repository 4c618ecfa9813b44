"""Learning from logged episodes alone: compiled epochs over a data set, and bandits whose fixed points are known.

Called by experiments and by anyone with logs of their own; imports no environments.
"""

from gemsjax.offline.training import OfflinePlan, OfflineTraining, make_offline_training

__all__ = ["OfflinePlan", "OfflineTraining", "make_offline_training"]
