-- The leader's lease and the fencing epoch. Keys: see write.lua.
--
-- KEYS  1 epoch
-- ARGV  1 acquire | renew | release
--       2 owner (acquire), epoch (renew, release)
--       3 milliseconds the lease lasts (acquire, renew)
--       4 owner (renew), the highest epoch that the caller has heard of (acquire)
--
-- acquire returns {epoch, 0, ''}, or {0, milliseconds left, '<epoch> <owner>'} while it is held. The
--   new epoch is at least the unix time in seconds: a Redis that came back empty must not hand out
--   an epoch that workers have seen before. Error: LOST (Redis has forgotten that epoch: its leader
--   may live and have everything in memory).
-- renew returns the number of the last write that Redis holds of this epoch, -1 if it had forgotten
--   the epoch (it is told again), -2 when another leader came. A lease that lapsed is taken up
--   again if nobody had it since.
-- release returns 1 if it was ours.

local call = redis.call
local base = string.sub(KEYS[1], 1, -6)
local epoch = tonumber(call('GET', KEYS[1]) or '0')

if ARGV[1] == 'acquire' then
  local held = call('GET', base .. 'lease')
  if held then
    return {0, call('PTTL', base .. 'lease'), held}
  end
  if epoch < tonumber(ARGV[4]) then
    return redis.error_reply('LOST: epoch ' .. ARGV[4])
  end
  epoch = math.max(epoch + 1, tonumber(call('TIME')[1]))
  call('SET', KEYS[1], string.format('%d', epoch))
  call('DEL', base .. 'seq')
  call('SET', base .. 'lease', string.format('%d %s', epoch, ARGV[2]), 'PX', ARGV[3])
  return {epoch, 0, ''}
end

local mine = tonumber(ARGV[2])
if ARGV[1] == 'release' then
  return epoch == mine and call('DEL', base .. 'lease') or 0
end

if epoch > mine then
  return -2
end
call('SET', base .. 'lease', ARGV[2] .. ' ' .. ARGV[4], 'PX', ARGV[3])
if epoch < mine then
  call('SET', KEYS[1], ARGV[2])
  call('DEL', base .. 'seq')
  return -1
end
return tonumber(call('GET', base .. 'seq') or '0')
