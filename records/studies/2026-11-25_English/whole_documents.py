"""The new script with whole documents, read as the others read them: seed 0, the log in whole/."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import study

row = study.SCRIPTS["new"]
stages = row["tables"]["STAGES"].replace("512, ", "0,   ").replace("1024,", "0,   ")
row = dict(row, tables=row["tables"] | dict(STAGES=stages), steps={"whole": (288, 16)})
f = study.trials("new"); best = min(f, key=f.get)
study.SCRIPTS = {"new_whole_documents": row}
study.make(); study.run("new_whole_documents", best, "whole", 0)
