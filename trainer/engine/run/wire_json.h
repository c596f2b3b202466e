/* Prints the wire formats as JSON on standard output (see wire_json.c). */
#ifndef HS_RUN_WIRE_JSON_H
#define HS_RUN_WIRE_JSON_H

void hs_wire_print(void);

#endif
