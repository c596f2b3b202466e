/* Open files of this process: as many as the system allows, and what it means where they run out. */
#ifndef HS_CORE_FILES_H
#define HS_CORE_FILES_H

#include "core/status.h"

/* Raises this process's limit to the hard one. What it starts has it too. */
void hs_files_allow(void);

/* Of a call that makes a descriptor, or waits for some, and failed with `code` (an errno). CONFIG,
 * with the limit and the mend, where this process may have no more of them: EMFILE, and of poll
 * EINVAL. LOST where the machine has no more. IO else. `what` begins the sentence. */
hs_status hs_files_failed(hs_why *why, const char *what, int code);

#endif
