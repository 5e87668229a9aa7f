"""Stages against Mudd on English: records/studies/2026-11-25_English/study.py with other scripts, in float32.

    python records/studies/2026-11-28_English/study.py make
    python records/studies/2026-11-28_English/study.py final NAME...    # seeds 0, 1, 2, scripts in turn: final/
    python records/studies/2026-11-28_English/study.py table

The rates of both are those that the search of 2026-11-25 found for Stages (search.tsv).
"""
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

HERE = Path(__file__).resolve().parent
spec = spec_from_file_location("study", HERE.parent / "2026-11-25_English" / "study.py")
study = module_from_spec(spec)
spec.loader.exec_module(study)

STAGES = study.SCRIPTS["new"]
MUDD = dict(STAGES, script=os.environ.get("MUDD", "records/2026-11-28_Mudd/train_gpt.py"), tables=dict(
    STAGES["tables"], LAYERS="""(
        #     attention  value  skip  attends  xsa    mudd   to_head
        Layer("paired",  0,     None, None,    False, False, 0.0),
        Layer("short",   1,     None, None,    True,  False, None),
        Layer("long",    None,  None, None,    True,  False, -0.5),
        Layer("long",    2,     0,    2,       True,  True,  None))"""))
study.HERE, study.DTYPE, study.BASELINE = HERE, "float32", "2026-11-25_Stages"
study.SANDBOX = study.SANDBOX.with_name("english2")
sys.path.insert(0, str(study.SANDBOX))
study.SCRIPTS = {"2026-11-25_Stages": STAGES, "2026-11-28_Mudd": MUDD}

if __name__ == "__main__":
    command, names = sys.argv[1], sys.argv[2:] or list(study.SCRIPTS)
    dict(make=study.make, table=study.table).get(command, lambda: study.final(names))()
