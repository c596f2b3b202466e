/* Which algorithms of a device's library compute the products of a run, part of a backend's table
 * (backend.h, products): bits follow from them, so that a run chooses once and keeps the choice
 * (run/algorithms.h; wire/algorithms.h has the records).
 *
 * Order of calls, after alloc and check, while all memory is zero: library, need for every call that
 * will be launched, use, then, where something is missing, choose, and use again. A launch whose
 * product has no algorithm is HS_E_BUG. All of them block.
 */
#ifndef HS_BACKEND_PRODUCTS_H
#define HS_BACKEND_PRODUCTS_H

#include "backend/backend.h"
#include "wire/algorithms.h"

typedef struct hs_product_table {
    /* "cuBLASLt 13.1.0"; NULL: this device's kernel path has nothing to choose, and the others are
     * not called. Valid until close. */
    const char *(*library)(hs_device *device);
    /* HS_E_CONFIG: more different products than HS_ALGORITHMS_MAX. */
    hs_status (*need)(hs_device *device, uint16_t kernel, const hs_args *args, hs_why *why);
    /* Of what is needed and has none, the first of each product in the list; entries are of this kind
     * of device and this library. HS_E_CONFIG: the library refuses one. */
    hs_status (*use)(hs_device *device, const hs_algorithm *list, uint32_t count, hs_why *why);
    /* How many of what is needed have none. */
    uint32_t (*missing)(hs_device *device);
    /* Times the candidates of those on their own operands, which stay zero: an entry for each, in
     * the order in which they were needed; one of 0 candidates where the library has none, and a plain kernel
     * computes the product. HS_E_DEVICE. */
    hs_status (*choose)(hs_device *device, hs_algorithm *list, hs_why *why);
} hs_product_table;

#endif
