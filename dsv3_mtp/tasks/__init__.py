"""Generated tasks with known answers: a file each, with its keys, its examples, its grading and the
names of its metrics.

Every file of this folder is imported and registers its class (config/task.py says what that is
asked; base.py has what tasks of examples share). A task from elsewhere is named by
`data.task.type: package.module:Class`.
"""

from dsv3_mtp.config.registry import import_all

import_all(__name__)
