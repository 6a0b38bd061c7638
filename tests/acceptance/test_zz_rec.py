import sys
import time

sys.path.insert(0, "/work/main")
from tests.acceptance.test_crash_sweep import *


def test_rec(worlds):
    for k in KINDS:
        t = time.time()
        try:
            ts = record(worlds[0], [k])
        except BaseException:
            print(worlds[0].log.read_text()[-6000:])
            raise
        print(k, round(time.time() - t, 2), len(ts))
        for x in ts:
            print("  ", x)
