"""From rollout workers to the learner: who is asked when, what comes back, what is lost.

collectors.py  one small interface; sampling in this process, in step, or beside the learner
pool.py        the remote workers: asked, answering, lost, coming back
faults.py      what was lost, for the results
"""
